"""The tables of a report and of the scores of rules."""

from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from odp_callbacks import Teacher, diagnose
from odp_callbacks.analysis.summaries import summarise
from odp_callbacks.gates import score_rules
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.table import rules_table, summary_table
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.records import MakeReport, split
from tests.helpers.updates import update_only, with_features, with_update


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


def test_rules_are_ranked_by_update_gain_in_eighty_columns(make_report: MakeReport) -> None:
    nodes = make_report(lambda correct, depth: (-0.4, 0.6) if correct else (0.8, -0.2), noise=0.3)
    both = with_features(with_update(nodes, lambda correct: (-0.6, 0.6) if correct else (0.8, 0.3)))
    for report in (both, replace(both, nodes=())):
        text = printed(rules_table(score_rules(report)))
        assert "…" not in text
        assert "needs `rules=`" in text  # no rule but those by correctness was measured
        near, far = (text[text.index(teacher) :] for teacher in ("near", "far "))
        assert near.index("incorrect rollouts") < near.index("everything") < near.index("correct rollouts", 300)
        assert far.index("correct rollouts") < far.index("everything")


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


def headings(text: str) -> list[str]:
    """The columns' headings of a printed table, their two lines joined."""
    first, second = (line.split() for line in text.split("\n")[1:3])
    return [f"{upper} {lower}" for upper, lower in zip(first, second, strict=True)]


def test_the_update_gain_is_the_first_column(make_report: MakeReport) -> None:
    for report, expected in (
        (
            update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1)),
            ["update gain", "contri- bution", "update alignment", "tokens quest."],
        ),
        (
            with_update(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1)),
            ["update gain", "predicted gain", "gain-weighted alignment", "tokens quest.", "undef. undet."],
        ),
        (
            make_report(split),
            ["predicted gain", "gain-weighted alignment", "alignment (token mean)", "tokens quest.", "undef. undet."],
        ),
    ):
        output = StringIO()
        Console(file=output, width=120).print(summary_table(report))
        text = output.getvalue().replace("(token mean)", "(token_mean)")
        assert [heading.replace("_", " ") for heading in headings(text)[1:]] == expected
        assert "…" not in printed(summary_table(replace(report, teachers=("near", "far"))))


def test_a_report_without_nodes_counts_the_tokens_of_the_update(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1))
    text = printed(summary_table(report))
    row = text[text.index("near") :].split("\n")[:2]
    estimate = summarise(report)[0].figures["update_gain"]
    assert row[0].split()[1] == f"{estimate.value:+.3f}"
    assert row[0].split()[-1] == str(12 * 8)
    assert f"{estimate.low:.2f} to {estimate.high:.2f}" in row[1]
    assert row[1].split()[-1] == "6"
    assert "Difference between teachers on the same rollouts" in text
    assert "first helps more" in text
    assert "Predicted gain" not in text
