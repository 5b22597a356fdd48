"""How many questions would decide, against repeated draws."""

import math

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.questions_needed import POWER, decided_again, growth_to_decide, rounded_up


def mean_of(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Estimate:
    estimator = Estimator(lambda weights: weights @ values / weights.sum(-1), np.ones(len(values), bool), len(values))
    return jackknife(estimator)


@pytest.mark.parametrize("truth", [0.1, -0.15])
def test_so_many_questions_decide_with_the_stated_power(truth: float) -> None:
    generator, small = np.random.default_rng(0), 40
    spread = generator.normal(size=small)
    spread = (spread - spread.mean()) / spread.std()
    estimate = mean_of(truth + spread)  # an estimate that is exactly the truth
    assert estimate.low < 0 < estimate.high
    larger = round(growth_to_decide(estimate) * small)
    decided = 0
    for _ in range(400):
        repeated = stats.ttest_1samp(truth + generator.normal(size=larger), 0).confidence_interval(0.95)
        decided += repeated.low > 0 or repeated.high < 0
    assert decided / 400 == pytest.approx(POWER, abs=0.08)


@pytest.mark.parametrize("truth", [0.35, -0.6])
def test_a_repetition_decides_as_often_as_stated(truth: float) -> None:
    generator, questions = np.random.default_rng(1), 40
    spread = generator.normal(size=questions)
    spread = (spread - spread.mean()) / spread.std()
    estimate = mean_of(truth + spread)
    assert estimate.low > 0 or estimate.high < 0
    decided = 0
    for _ in range(1000):
        repeated = stats.ttest_1samp(truth + generator.normal(size=questions), 0).confidence_interval(0.95)
        decided += repeated.low > 0 if truth > 0 else repeated.high < 0
    assert decided / 1000 == pytest.approx(decided_again(estimate), abs=0.04)


def test_what_is_decided_needs_no_more() -> None:
    assert growth_to_decide(Estimate(0.2, 0.1, 0.3, 8, 8)) == growth_to_decide(Estimate(-0.2, -0.3, -0.1, 8, 8)) == 1


def test_a_higher_level_needs_more() -> None:
    wide, narrow = Estimate(0.1, -0.3, 0.5, 8, 8), Estimate(0.1, -0.1, 0.3, 8, 8)
    assert growth_to_decide(wide) > growth_to_decide(narrow) > 1


def test_without_an_interval_or_a_sign_there_is_no_number() -> None:
    assert math.isnan(growth_to_decide(Estimate(0.1, math.nan, math.nan, 2, 2)))
    assert math.isnan(decided_again(Estimate(0.1, math.nan, math.nan, 2, 2)))
    assert growth_to_decide(Estimate(0.0, -0.1, 0.1, 8, 8)) == math.inf


def test_numbers_of_questions_are_rounded_up() -> None:
    assert [rounded_up(count) for count in (1.0, 9.2, 99.5, 101.0, 2010.0)] == [1, 10, 100, 110, 2100]
