"""Intervals of single tokens' influence."""

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.token_influence import influence_intervals
from odp_callbacks.update_records import TokenInfluence


def measured(by_fold: np.ndarray) -> TokenInfluence:
    """Four folds with three questions each."""
    folds, count, teachers = by_fold.shape
    place = np.arange(count)
    norms = np.ones((count, teachers), np.float32)
    return TokenInfluence(place, place, by_fold.astype(np.float32), np.full(folds, 3.0), np.full(teachers, 2.0), norms)


def test_a_few_tokens_have_the_t_interval_of_their_folds() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3, 1))
    values[0] = np.nan
    intervals = influence_intervals(measured(values))
    for token in range(3):
        folds = values[1:, token, 0].astype(np.float32)
        low, high = stats.t.interval(0.95, 2, loc=folds.mean() / 2, scale=stats.sem(folds) / 2)
        assert intervals.value[token, 0] == pytest.approx(folds.mean() / 2)
        assert (intervals.low[token, 0], intervals.high[token, 0]) == pytest.approx((low, high))


@pytest.mark.parametrize("silent", [1, 2])
def test_folds_without_a_success_gradient_count_in_the_mean_but_are_no_evidence_of_spread(silent: int) -> None:
    values = np.random.default_rng(0).normal(size=(4, 30, 1))
    values[0] = np.nan
    values[1 : 1 + silent] = 0.0
    intervals = influence_intervals(measured(values))
    np.testing.assert_allclose(intervals.value, values[1:].mean(axis=0) / 2, rtol=1e-5)
    assert np.isfinite(intervals.low).all() == (silent == 1)
