"""The folder of a diagnosis: what a fault leaves there is measured again or refused, and nothing is mixed up."""

import json
import shutil
from pathlib import Path

import pytest

from odp_callbacks.cli.main import main
from odp_callbacks.storage import load
from tests.cli.conftest import OddLengthReward
from tests.helpers.command_line import diagnose_arguments, printed_json
from tests.helpers.faults import flip_bit


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_settings_that_a_kill_cut_short_do_not_make_the_folder_unusable(
    content: str, student_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was "Expecting value" for ever."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "diagnosis.json").write_text(content)
    arguments = diagnose_arguments(student_folder, dataset, output, questions=1)
    assert main(arguments) == 0
    assert json.loads((output / "diagnosis.json").read_text())["seed"] == 0
    (output / "diagnosis.json").write_text(content)
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "it cannot be told which diagnosis its questions belong to" in error
    assert "Give another folder, or remove that one." in error


def test_a_damaged_question_is_measured_again_and_no_other(
    student_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], odd_reward: OddLengthReward
) -> None:
    arguments = [*diagnose_arguments(student_folder, dataset, tmp_path / "out", questions=2), "--json"]
    assert main(arguments) == 0
    expected, calls = printed_json(capsys), len(odd_reward.calls)
    flip_bit(tmp_path / "out" / "questions" / "00001" / "nodes.parquet", 5000)
    odd_reward.calls.clear()
    with pytest.warns(UserWarning, match=r"question 1 is measured again, because .* is not what was written"):
        assert main(arguments) == 0
    assert printed_json(capsys)["classes"] == expected["classes"]
    assert 0 < len(odd_reward.calls) < calls


def test_drafts_and_foreign_files_among_the_questions_do_not_matter(
    student_folder: str, dataset: str, tmp_path: Path
) -> None:
    arguments = diagnose_arguments(student_folder, dataset, tmp_path / "out", questions=1)
    assert main(arguments) == 0
    questions = tmp_path / "out" / "questions"
    shutil.copytree(questions / "00000", questions / ".00001-abcdef")
    (questions / ".00000.journal").write_bytes(b"\xff\xfe[1, [2")
    (questions / ".DS_Store").write_text("")
    (tmp_path / "out" / "notes.txt").write_text("")
    assert main(arguments) == 0
    assert len(load(tmp_path / "out" / "records").rollouts) == 2


@pytest.mark.parametrize("output", ["s3://bucket/out", "memory://out"])
def test_a_url_as_output_is_refused_before_anything_is_loaded(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = diagnose_arguments("no/model", "no-data.jsonl", Path("x"))
    arguments = [argument for argument in arguments if not argument.startswith("--output")]
    assert main([*arguments, f"--output={output}"]) == 2
    assert f"`output` is '{output}', but only local paths are supported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(diagnose_arguments("no/model", "no-data.jsonl", tmp_path / "file")) == 2
    assert "`output` is" in capsys.readouterr().err
