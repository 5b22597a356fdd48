"""Pooled figures: their arithmetic against explicit sums, and how often any of their intervals misses."""

import math

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.confidence_sequences import ConfidenceSequence, mixture_bound


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_pooled_value_is_the_weighted_mean_of_the_looks(decay: float) -> None:
    rng = np.random.default_rng(0)
    values, variances, degrees = rng.normal(size=5), rng.uniform(0.5, 2, 5), np.array([3, 4, 7, 7, 5])
    sequence = ConfidenceSequence(decay)
    for look in zip(values, variances, degrees, strict=True):
        sequence.add(*map(float, look))
    weights = decay ** np.arange(4, -1, -1)
    value, low, high = sequence.interval()
    assert value == pytest.approx(np.average(values, weights=weights))
    parts = weights**2 * variances
    pooled_degrees = parts.sum() ** 2 / (parts**2 / degrees).sum()
    quantile = stats.t.isf(stats.norm.sf(mixture_bound(5, decay)), pooled_degrees)
    half_width = quantile * math.sqrt(parts.sum()) / weights.sum()
    assert (value - low, high - value) == pytest.approx((half_width, half_width))


def test_the_bound_is_that_of_robbins_mixture() -> None:
    prior = 2.0  # a tenth of 20 looks
    for look in (1, 20, 500):
        expected = math.sqrt((look + prior) * math.log((look + prior) / (prior * 0.05**2)) / look)
        assert mixture_bound(look, 1.0) == pytest.approx(expected)


def test_the_first_epoch_of_a_forgetting_sequence_has_half_of_the_error() -> None:
    sums = [sum(0.5 ** (2 * k) for k in range(look)) for look in (1, 2)]
    prior = 0.1 * sums[1] * 4  # the second look is the tightest; the first has a weight of 2 in the units of its own
    expected = math.sqrt((1 + prior) * math.log((1 + prior) / (prior * 0.025**2)))
    assert mixture_bound(1, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_any_look_of_two_hundred_misses_seldom_although_the_truth_drifts(decay: float) -> None:
    rng = np.random.default_rng(1)
    runs, missed = 40, 0
    for _ in range(runs):
        truth = np.cumsum(0.2 * rng.normal(size=200))
        values, variances = truth + rng.normal(size=200), rng.chisquare(4, 200) / 4
        sequence, target, weight, outside = ConfidenceSequence(decay), 0.0, 0.0, False
        for value, variance, true_value in zip(values, variances, truth, strict=True):
            sequence.add(value, variance, 4)
            target, weight = decay * target + true_value, decay * weight + 1
            _, low, high = sequence.interval()
            outside |= not low <= target / weight <= high
        missed += outside
    assert stats.binomtest(missed, runs, 0.05, alternative="greater").pvalue > 1e-3


def test_a_look_without_a_number_changes_nothing() -> None:
    sequence = ConfidenceSequence()
    assert all(math.isnan(number) for number in sequence.interval())
    sequence.add(0.5, 0.1, 3)
    before = sequence.state()
    for look in ((math.nan, 0.1, 3), (0.5, math.nan, 3)):
        sequence.add(*look)
    assert sequence.state() == before


def test_a_look_that_tells_nothing_counts_with_its_value() -> None:
    sequence = ConfidenceSequence()
    sequence.add(0.0, 0.0, 0)
    assert all(math.isnan(number) for number in sequence.interval()), "nothing was told yet; 0 would be a claim"
    sequence.add(0.5, 0.1, 3)
    value, low, high = sequence.interval()
    assert value == 0.25
    assert low < value < high


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_looks_that_tell_nothing_are_as_uncertain_as_the_others(decay: float) -> None:
    both = ConfidenceSequence(decay), ConfidenceSequence(decay)
    for look in range(60):
        silent = look % 3 == 0 or look > 30
        both[0].add(0.0 if silent else 0.3, 0.0 if silent else 0.04, 7)
        both[1].add(0.3, 0.04, 7)
    widths = [high - low for _, low, high in (sequence.interval() for sequence in both)]
    assert widths[0] >= widths[1], "fewer degrees of freedom, and the same variance"
    assert widths[0] == pytest.approx(widths[1], rel=0.5)


@pytest.mark.parametrize("decay", [0.0, 1.5, True, "all"])
def test_a_decay_that_cannot_be_is_refused(decay: object) -> None:
    with pytest.raises(ValueError, match=r"`decay` must lie in \(0, 1\]"):
        ConfidenceSequence(decay)  # type: ignore[arg-type]
