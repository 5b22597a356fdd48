"""The interval for skewed figures against Hall's transformation itself, and its coverage."""

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.skewness import skewed_interval


@pytest.mark.parametrize("skewness", [-1.2, -0.3, 1e-9, 0.4, 2.0])
def test_the_ends_are_where_the_transformed_error_is_the_quantile(skewness: float) -> None:
    value, error, count, quantile = 0.7, 0.2, 16, 2.1
    for end, expected in zip(skewed_interval(value, error, skewness, count, quantile), (quantile, -quantile)):
        studentised = (value - end) / error
        scaled = skewness / np.sqrt(count)
        transformed = studentised + scaled * (studentised**2 / 3 + 1 / 6) + scaled**2 * studentised**3 / 27
        assert transformed == pytest.approx(expected)


def test_it_covers_the_mean_of_a_skewed_distribution_more_often_than_students_interval() -> None:
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(1000, 16))
    quantile, covered, covered_symmetric = stats.t.ppf(0.975, 15), 0, 0
    for sample in samples:
        mean, error = sample.mean(), stats.sem(sample)
        low, high = skewed_interval(mean, error, float(stats.skew(sample)), 16, quantile)
        covered += low <= 1 <= high
        covered_symmetric += abs(mean - 1) <= quantile * error
    assert covered > covered_symmetric
    assert stats.binomtest(covered, len(samples), 0.95).pvalue > 1e-3
