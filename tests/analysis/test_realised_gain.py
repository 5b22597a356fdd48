"""Predicted beside realised: paired intervals, and whether the two agree."""

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.realised_gain import mean_over_questions, realised_gain

GAIN = Estimate(0.5, 0.2, 0.8, questions=20, nodes=100)


def rates(seed: int, shift: float, count: int = 40) -> np.ndarray:
    """Success of questions of very different difficulty, before (shift 0) and after a step."""
    difficulty = np.random.default_rng(0).random(count)
    return np.random.default_rng(seed).binomial(8, np.clip(0.6 * difficulty + shift, 0, 1)) / 8


def test_the_interval_of_the_change_is_that_of_a_paired_t_test() -> None:
    before, after = rates(1, 0.0), rates(2, 0.15)
    found = realised_gain("answer", GAIN, 0.3, before, after)
    low, high = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (found.change.low, found.change.high) == pytest.approx((low, high))
    assert found.change.value == pytest.approx(found.after.value - found.before.value)
    low, high = stats.t.interval(0.95, len(before) - 1, before.mean(), stats.sem(before))
    assert (found.before.low, found.before.high) == pytest.approx((low, high))


def test_the_prediction_is_the_update_gain_times_the_length() -> None:
    found = realised_gain("answer", GAIN, 0.3, rates(1, 0.0), rates(2, 0.15))
    assert (found.predicted.value, found.predicted.low, found.predicted.high) == pytest.approx((0.15, 0.06, 0.24))


@pytest.mark.parametrize(("shift", "agrees"), [(0.15, True), (-0.3, False)])
def test_agreement_is_of_independent_intervals(shift: float, agrees: bool) -> None:
    found = realised_gain("answer", GAIN, 0.3, rates(1, 0.0), rates(2, shift))
    assert found.agrees is agrees
    assert found.surprise.half_width == pytest.approx(np.hypot(found.change.half_width, found.predicted.half_width))


def test_without_an_interval_nothing_is_said_about_agreement() -> None:
    unknown = Estimate(0.5, np.nan, np.nan, questions=2, nodes=5)
    assert realised_gain("answer", unknown, 0.3, rates(1, 0.0), rates(2, 0.1)).agrees is None
    assert np.isnan(mean_over_questions(np.array([0.5, 1.0])).low), "two questions have no interval"


def test_questions_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="`before` and `after`"):
        realised_gain("answer", GAIN, 0.3, rates(1, 0.0), rates(2, 0.1)[:-1])
