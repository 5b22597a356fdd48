"""A report as plain text."""

import re

import pytest

from odp_callbacks.analysis.summaries import Analysis, summarise
from odp_callbacks.visualization.report_text import as_code, changes_text, table_text
from tests.helpers.records import HOSTILE, MakeReport, split
from tests.helpers.updates import update_only, with_update

INTERVAL = re.compile(r"([+-]?\d+\.\d+) to ([+-]?\d+\.\d+)")


def interval_lengths(text: str) -> list[float]:
    return [float(high) - float(low) for low, high in INTERVAL.findall(text)]


def outcomes(text: str) -> dict[str, str]:
    """Lines of a text on changes, by teacher and class."""
    return {line.partition(":")[0]: line for line in text.split("\n")[2:]}


def test_a_change_needs_an_interval_without_0(make_report: MakeReport) -> None:
    low = summarise(make_report(lambda correct, depth: (0.1, 0.5), noise=0.01))
    high = summarise(make_report(lambda correct, depth: (0.9, 0.5), noise=0.01, seed=1))
    forwards = outcomes(changes_text(low, high))
    assert forwards["near, all rollouts"].endswith("rose")
    assert forwards["far, all rollouts"].endswith("no significant change")
    backwards = outcomes(changes_text(high, low))
    assert backwards["near, all rollouts"].endswith("fell")


def test_an_80_percent_interval_is_narrower_in_the_text_on_changes(make_report: MakeReport) -> None:
    lengths = {}
    for confidence in (0.8, 0.95):
        previous, current = (summarise(make_report(split, seed=seed, noise=0.2), confidence) for seed in range(2))
        text = changes_text(previous, current, confidence)
        assert f"{100 * confidence:g}% intervals" in text
        lengths[confidence] = [
            float(high) - float(low) for low, high in re.findall(r"\(([+-][\d.]+) to ([+-][\d.]+)\)", text)
        ]
    assert len(lengths[0.8]) == 8
    assert all(0 < short < long for short, long in zip(lengths[0.8], lengths[0.95], strict=True))


def test_an_80_percent_interval_is_narrower_in_the_table(make_report: MakeReport) -> None:
    report, lengths = make_report(split, noise=0.4), {}
    for confidence in (0.8, 0.95):
        text = table_text(Analysis(report, confidence))
        assert f"{100 * confidence:g}% intervals" in text
        lengths[confidence] = interval_lengths(text)
    pairs = list(zip(lengths[0.8], lengths[0.95], strict=True))
    assert len(pairs) >= 8
    assert all(short <= long for short, long in pairs)
    assert sum(short for short, _ in pairs) < 0.8 * sum(long for _, long in pairs)


def test_the_change_is_in_update_gain_if_both_probes_measured_it(make_report: MakeReport) -> None:
    of_nodes = make_report(split)
    low, high = (summarise(with_update(of_nodes, lambda correct, gain=gain: (gain, 0.0))) for gain in (0.1, 0.9))
    text = changes_text(low, high)
    assert text.startswith("Change in update gain")
    assert outcomes(text)["near, all rollouts"].endswith("rose")
    assert changes_text(summarise(of_nodes), high).startswith("Change in predicted gain")
    alone = summarise(update_only(of_nodes, lambda correct: (0.1, 0.0)))
    assert "no change to tell" in changes_text(summarise(of_nodes), alone)


@pytest.mark.parametrize("text", HOSTILE)
def test_code_has_no_control_characters(text: str) -> None:
    assert all(line.isprintable() for line in as_code(text).split("\n"))
    assert as_code(HOSTILE[2]).isprintable()
