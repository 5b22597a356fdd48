"""The ranking of teachers, and the answer in words."""

from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.ranking import rank, verdict
from odp_callbacks.analysis.summaries import Analysis
from tests.helpers.records import MakeReport


def test_places_are_by_predicted_gain_and_differences_on_the_same_nodes(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.6, -0.2 if correct else 0.1))
    ranking, analysis = rank(report), Analysis(report)
    assert list(ranking.classes)[:3] == ["all", "correct", "incorrect"]
    questions = {node.question for node in report.nodes}
    assert sum(name.startswith("question ") for name in ranking.classes) == len(questions)
    gains = {(summary.split, summary.teacher): summary.figures["predicted_gain"] for summary in analysis.summaries()}
    for split in ("all", "correct", "incorrect"):
        places = ranking.classes[split]
        gain_values = [place.gain.value for place in places if not np.isnan(place.gain.value)]
        assert gain_values == sorted(gain_values, reverse=True)
        assert places[0].behind is None
        for place in places:
            np.testing.assert_equal(place.gain.value, gains[split, place.teacher].value)
            assert place.verdict == verdict(place.gain)
            if place.behind is not None and not np.isnan(place.gain.value):
                assert place.behind.value == pytest.approx(places[0].gain.value - place.gain.value)
                assert place.worse == (place.behind.low > 0)


def test_where_success_never_differs_that_is_the_answer(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.6, 0.1))
    rollouts = tuple(replace(rollout, reward=0.0) for rollout in report.rollouts)
    nodes = tuple(replace(node, total=0 * node.total, total_square=0 * node.total) for node in report.nodes)
    answer = rank(replace(report, rollouts=rollouts, nodes=nodes)).answer
    assert answer.startswith("Nothing can be told: every rollout and continuation has the reward 0.")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.2, "helps"), (-0.2, -0.1, "harms"), (-0.1, 0.1, "undecided"), (np.nan, np.nan, "undecided")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, expected: str) -> None:
    assert verdict(Estimate(0.0, low, high, 5, 5)) == expected


def test_the_answer_names_every_teacher_once(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.6, -0.2 if correct else 0.1))
    first_sentence = rank(report).answer.partition(".")[0]
    assert all(first_sentence.count(f"“{teacher}”") == 1 for teacher in report.teachers)


def test_an_undecided_answer_is_a_sentence(make_report: MakeReport) -> None:
    one = make_report(lambda correct, depth: (0.0,), teachers=("near",), noise=0.5)
    assert rank(one).answer == "The evidence does not show whether “near” helps."
    two = make_report(lambda correct, depth: (0.0, 0.0), noise=0.5)
    assert rank(two).answer in {
        "The evidence does not show whether “near” and “far” help.",
        "The evidence does not show whether “far” and “near” help.",
    }
