"""The folder of a diagnosis: what a fault leaves there is measured again or refused, and nothing is mixed up."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from odp_callbacks.cli import diagnosis
from odp_callbacks.cli.main import main
from odp_callbacks.storage import load
from tests.cli.conftest import OddLengthReward
from tests.helpers.command_line import diagnose_arguments, printed_json
from tests.helpers.faults import flip_bit
from tests.helpers.probes import ALL_GRADIENTS


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


def test_a_damaged_block_is_measured_again_and_no_other(
    student_folder: str,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    odd_reward: OddLengthReward,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosis, "MAXIMUM_BLOCK", 1)
    arguments = [*diagnose_arguments(student_folder, dataset, tmp_path / "out", questions=2), "--json"]
    assert main(arguments) == 0
    expected, calls = printed_json(capsys), len(odd_reward.calls)
    flip_bit(tmp_path / "out" / "blocks" / "00001" / "nodes.parquet", 5000)
    odd_reward.calls.clear()
    with pytest.warns(UserWarning, match=r"block 1 is measured again, because .* is not what was written"):
        assert main(arguments) == 0
    assert printed_json(capsys)["classes"] == expected["classes"]
    assert 0 < len(odd_reward.calls) < calls


def test_drafts_and_foreign_files_among_the_blocks_do_not_matter(
    student_folder: str, dataset: str, tmp_path: Path
) -> None:
    arguments = diagnose_arguments(student_folder, dataset, tmp_path / "out", questions=1)
    assert main(arguments) == 0
    blocks = tmp_path / "out" / "blocks"
    shutil.copytree(blocks / "00000", blocks / ".00001-abcdef")
    (tmp_path / "out" / "journal").write_bytes(b"\xff\xfe[1, [2")
    (blocks / ".DS_Store").write_text("")
    (tmp_path / "out" / "notes.txt").write_text("")
    assert main(arguments) == 0
    assert len(load(tmp_path / "out" / "records").rollouts) == 2


def test_blocks_have_the_figures_of_their_questions_alone(
    student_folder: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fixed numbers of continuations and of gradients, no question's draws depend on the questions beside it."""
    # A sample of nodes with gradients would be one of the whole block's nodes.
    fixed = {"questions": 3, **{f"measure.{name}": share for name, share in ALL_GRADIENTS.items()}}
    assert main(diagnose_arguments(student_folder, dataset, tmp_path / "one", **fixed)) == 0
    monkeypatch.setattr(diagnosis, "MAXIMUM_BLOCK", 2)
    assert main(diagnose_arguments(student_folder, dataset, tmp_path / "two", **fixed)) == 0
    one, two = (load(tmp_path / name / "records") for name in ("one", "two"))
    assert [rollout.pieces for rollout in one.rollouts] == [rollout.pieces for rollout in two.rollouts]
    assert len(list((tmp_path / "two" / "blocks").iterdir())) == 2
    for ours, theirs in zip(one.nodes, two.nodes, strict=True):
        assert ours.total.tolist() == theirs.total.tolist()
        np.testing.assert_allclose(ours.gram, theirs.gram, rtol=1e-4, atol=1e-6)


def test_a_diagnosis_continues_in_the_blocks_that_it_began_with(
    student_folder: str,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    odd_reward: OddLengthReward,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The memory that is free decides about the blocks, and it is another one when the diagnosis is started again."""
    arguments = [*diagnose_arguments(student_folder, dataset, tmp_path / "out", questions=3), "--json"]
    monkeypatch.setattr(diagnosis, "MAXIMUM_BLOCK", 2)
    assert main(arguments) == 0
    expected = printed_json(capsys)
    shutil.rmtree(tmp_path / "out" / "blocks" / "00001")
    monkeypatch.setattr(diagnosis, "MAXIMUM_BLOCK", 64)
    odd_reward.calls.clear()
    assert main(arguments) == 0
    assert printed_json(capsys)["classes"] == expected["classes"]
    assert odd_reward.calls


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
