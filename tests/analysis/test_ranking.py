"""Who helps, in order and in words."""

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
    assert sum(name.startswith("question ") for name in ranking.classes) == len({n.question for n in report.nodes})
    gains = {(s.split, s.teacher): s.figures["predicted_gain"] for s in analysis.summaries()}
    for split in ("all", "correct", "incorrect"):
        places = ranking.classes[split]
        values = [p.gain.value for p in places if not np.isnan(p.gain.value)]
        assert values == sorted(values, reverse=True)
        assert places[0].behind is None
        for place in places:
            np.testing.assert_equal(place.gain.value, gains[split, place.teacher].value)
            assert place.verdict == verdict(place.gain)
            if place.behind is not None and not np.isnan(place.gain.value):
                assert place.behind.value == pytest.approx(places[0].gain.value - place.gain.value)
                assert place.worse == (place.behind.low > 0)


def test_where_success_never_differs_that_is_the_answer(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.6, 0.1))
    rollouts = tuple(replace(r, reward=0.0) for r in report.rollouts)
    nodes = tuple(replace(n, total=0 * n.total, total_square=0 * n.total) for n in report.nodes)
    answer = rank(replace(report, rollouts=rollouts, nodes=nodes)).answer
    assert answer.startswith("Nothing can be told: every rollout and continuation has the reward 0.")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.2, "helps"), (-0.2, -0.1, "harms"), (-0.1, 0.1, "undecided"), (np.nan, np.nan, "undecided")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, said: str) -> None:
    assert verdict(Estimate(0.0, low, high, 5, 5)) == said


def test_the_answer_names_every_teacher_once(make_report: MakeReport) -> None:
    report = make_report(lambda correct, depth: (0.6, -0.2 if correct else 0.1))
    answer = rank(report).answer.partition(".")[0]
    assert all(answer.count(f"“{name}”") == 1 for name in report.teachers)
