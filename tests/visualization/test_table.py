"""The tables of a report and of the scores of rules."""

from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from odp_callbacks import Teacher, diagnose
from odp_callbacks.gates import score_rules
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.table import rules_table, summary_table
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.records import MakeReport, split


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    rows = [
        {"prompt": prompt, "answer": answer}
        for prompt, answer in zip(("a b", "d", "c", "e f", "b"), "cabda", strict=True)
    ]

    def reward(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
        return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]

    teachers = {"answer": Teacher("{answer} {prompt}"), "self": Teacher()}
    return diagnose(tiny("llama").float(), word_tokenizer(), rows, reward, teachers, max_new_tokens=8, continuations=4)


def printed(table: Any) -> str:
    """Print a table in 80 columns."""
    output = StringIO()
    Console(file=output, width=80).print(table)
    return output.getvalue()


def test_the_table_shows_every_class_with_intervals_in_eighty_columns(report: ProbeReport) -> None:
    text = printed(summary_table(report))
    for word in (
        "answer",
        "self",
        "correct",
        "incorrect",
        "gap",
        "no estimate",
        "undet.",
        " to ",
        "answer - self",
        "no significant difference",
    ):
        assert word in text
    assert "…" not in text


def test_rules_are_ranked_by_predicted_gain_in_eighty_columns(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (-0.4, 0.6) if correct else (0.8, -0.2), noise=0.3)
    text = printed(rules_table(score_rules(report)))
    assert "…" not in text
    near, far = (text[text.index(teacher) :] for teacher in ("near", "far "))
    assert near.index("incorrect rollouts") < near.index("everything") < near.index("correct rollouts", 300)
    assert far.index("correct rollouts") < far.index("everything") < far.index("incorrect rollouts")


def test_no_note_is_cut_off(report: ProbeReport) -> None:
    with_single_continuations = replace(
        report,
        teachers=("answer", "solution"),
        nodes=tuple(replace(node, count=np.ones_like(node.count)) for node in report.nodes),
    )
    text = printed(summary_table(with_single_continuations))
    assert "few cont." in text
    assert "…" not in text


def test_the_summary_table_has_the_confidence_level_that_was_asked_for(make_report: MakeReport) -> None:
    report = make_report(split)
    assert "80% intervals" in printed(summary_table(report, 0.8))
    assert "95% intervals" in printed(summary_table(report))
    with pytest.raises(ValueError, match="`confidence` must"):
        summary_table(report, 80)
