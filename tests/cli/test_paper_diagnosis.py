"""``odp-callbacks diagnose --protocol paper`` on a tiny student in a local folder."""

from pathlib import Path

import pytest

from odp_callbacks.cli.main import main
from odp_callbacks.storage.paper_records import load_paper_record
from tests.cli.conftest import OddLengthReward
from tests.helpers.command_line import diagnose_arguments, printed_json

PAPER = {
    "protocol": "paper",
    "paper.rollouts_per_question": 8,
    "paper.enriched_visits": 4,
    "paper.minimum_visits": 2,
    "paper.max_new_tokens": 4,
}


def test_the_protocol_is_measured_saved_and_printed(
    student_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = diagnose_arguments(student_folder, dataset, tmp_path / "out", **PAPER)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Protocol of arXiv:2605.10889" in printed
    assert "G, the rollouts of a question, = 8 instead of 200" in printed
    record = load_paper_record(tmp_path / "out" / "paper.npz")
    assert record.teachers == ("answer", "base")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "paper.npz"]
    assert main([*arguments, "--json"]) == 0
    figures = printed_json(capsys)
    assert {row["teacher"] for row in figures["teachers"]} == {"answer", "base"}
    assert figures["deviations"] == list(record.deviations)


def test_an_interrupted_measurement_resumes(
    student_folder: str,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    odd_reward: OddLengthReward,
) -> None:
    assert main([*diagnose_arguments(student_folder, dataset, tmp_path / "whole", **PAPER), "--json"]) == 0
    whole = printed_json(capsys)
    arguments = diagnose_arguments(student_folder, dataset, tmp_path / "out", **PAPER)
    odd_reward.calls.clear()
    odd_reward.interrupt_after = 0  # the rollouts have been sampled and are scored
    assert main(arguments) == 130
    (journal,) = (tmp_path / "out").glob("paper-*.journal")
    sampled = journal.read_bytes()
    odd_reward.interrupt_after = None
    assert main([*arguments, "--json"]) == 0
    assert len(sampled) > 0
    assert printed_json(capsys)["teachers"] == whole["teachers"]
    assert not journal.exists()


def test_a_folder_of_other_arguments_is_refused(
    student_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(diagnose_arguments(student_folder, dataset, tmp_path / "out", **PAPER)) == 0
    assert main(diagnose_arguments(student_folder, dataset, tmp_path / "out", **{**PAPER, "seed": 3})) == 2
    assert "with other arguments" in capsys.readouterr().err
    (tmp_path / "out" / "paper.npz").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="measured again"):
        assert main(diagnose_arguments(student_folder, dataset, tmp_path / "out", **PAPER)) == 0


def test_an_unknown_protocol_is_refused(
    student_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(diagnose_arguments(student_folder, dataset, tmp_path / "out", protocol="papers")) == 2
    assert "`protocol` must be one of" in capsys.readouterr().err
