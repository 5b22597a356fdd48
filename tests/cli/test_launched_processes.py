"""Commands that a launcher such as torchrun starts in several processes."""

import os
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.cli import rewards
from odp_callbacks.cli.launched_processes import prepared_together
from odp_callbacks.cli.main import main
from odp_callbacks.cli.paper_diagnosis import RECORD_FILE
from odp_callbacks.storage import load
from odp_callbacks.storage.paper_records import load_paper_record
from tests.helpers.command_line import diagnose_arguments
from tests.helpers.training import odd_length_reward
from tests.helpers.two_processes import run_in_two_processes

GRADIENTS = {"measure.differing_gradients": 1.0, "measure.agreeing_gradients": 1.0}
PAPER = {"protocol": "paper", "paper.rollouts_per_question": 8, "paper.max_new_tokens": 4, "paper.enriched_visits": 8}


def commands(student: str, dataset: str, folder: Path) -> dict[str, list[str]]:
    """A diagnosis with the teachers' own accuracy, and one by the paper's protocol."""
    plain = diagnose_arguments(student, dataset, folder / "plain", teacher_accuracy=2, **GRADIENTS)
    paper = diagnose_arguments(student, dataset, folder / "paper", **PAPER)
    return {"plain": plain, "paper": paper, "refused": [*plain, "--confidence=2"]}


def _run(rank: int, folder: Path, student: str, dataset: str) -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        if failing and any(completions):
            raise KeyError("lost")
        return odd_length_reward(prompts, completions)

    rewards.REWARDS["odd"] = reward
    failing, ends = False, {}
    given = commands(student, dataset, folder)
    given["failing"] = diagnose_arguments(student, dataset, folder / "failing")
    for name, arguments in given.items():
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the last command's may linger
        failing = name == "failing" and rank == 1
        with redirect_stderr(StringIO()) as printed:
            try:
                ends[name] = main(arguments), printed.getvalue()
            except SystemExit as error:
                ends[name] = error.code, printed.getvalue()
    torch.save(ends, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(student_folder: str, dataset: str, tmp_path: Path) -> None:
    first, second = run_in_two_processes(_run, tmp_path, student_folder, dataset)
    alone = tmp_path / "alone"
    for name, arguments in commands(student_folder, dataset, alone).items():
        code, message = first[name]
        assert (code, second[name][0]) == ((2, 2) if name == "refused" else (0, 0)), message
        if name != "refused":
            assert main(arguments) == 0
    assert "`confidence` must" in first["refused"][1]
    assert second["refused"][1] == "", "what all processes refuse is said once"
    report, expected = load(tmp_path / "plain" / "records"), load(alone / "plain" / "records")
    assert [(one.question, one.text) for one in report.rollouts] == [(o.question, o.text) for o in expected.rollouts]
    for node, expected_node in zip(report.nodes, expected.nodes, strict=True):
        np.testing.assert_array_equal(node.total, expected_node.total)
        np.testing.assert_allclose(node.gram, expected_node.gram, rtol=1e-3, atol=1e-6)
    assert sorted(map(str, report.teacher_responses)) == sorted(map(str, expected.teacher_responses))
    assert report.left_out == expected.left_out
    assert report.settings == expected.settings
    assert [len(update.gram.questions) for update in report.updates] == [2, 2], "each process measures its part"
    assert (tmp_path / "plain" / "report.html").exists()
    record, expected_record = (load_paper_record(folder / "paper" / RECORD_FILE) for folder in (tmp_path, alone))
    assert record.settings == expected_record.settings
    assert (record.left_out, record.generated_tokens) == (expected_record.left_out, expected_record.generated_tokens)
    for question, expected_question in zip(record.questions, expected_record.questions, strict=True):
        assert question.id == expected_question.id
        for path, expected_path in zip(question.paths, expected_question.paths, strict=True):
            assert (path.text, path.enriched) == (expected_path.text, expected_path.enriched)
            np.testing.assert_allclose(path.student, expected_path.student, rtol=1e-4, atol=1e-5)
    assert second["failing"][0] == 1
    assert "in process 1: RewardError" in second["failing"][1] or "KeyError: 'lost'" in second["failing"][1]
    assert first["failing"][0] == 1
    assert "another process has ended before process 0 could exchange results" in first["failing"][1]


def test_a_single_process_raises_what_is_wrong() -> None:
    def prepare() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        prepared_together(Processes(), prepare)
    assert prepared_together(Processes(), lambda: 3) == 3
