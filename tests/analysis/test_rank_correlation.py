"""Rank correlations of weighted samples, against SciPy on repeated values."""

import math

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.rank_correlation import RankedColumn, rank_correlation


@pytest.mark.parametrize("levels", [3, 1000])
def test_a_weight_stands_for_so_many_equal_values(levels: int) -> None:
    generator = np.random.default_rng(levels)
    first, second = generator.integers(levels, size=(2, 40)).astype(float)
    second += first * (generator.random(40) < 0.3)
    columns = RankedColumn(first), RankedColumn(second)
    plain = rank_correlation(*columns, np.ones(40))
    assert plain == pytest.approx(stats.spearmanr(first, second).statistic)
    counts = generator.integers(4, size=40)
    repeated = stats.spearmanr(np.repeat(first, counts), np.repeat(second, counts)).statistic
    assert rank_correlation(*columns, counts.astype(float)) == pytest.approx(repeated)
    assert rank_correlation(*columns, 0.37 * counts) == pytest.approx(repeated), "only relative weights count"


def test_a_column_that_does_not_vary_has_no_correlation() -> None:
    varying, weight = RankedColumn(np.arange(7.0)), np.random.default_rng(0).random(7)
    assert math.isnan(rank_correlation(varying, RankedColumn(np.full(7, 0.1)), weight))
    assert math.isnan(rank_correlation(varying, varying, np.zeros(7)))
    assert math.isnan(rank_correlation(varying, varying, np.eye(7)[0]))
    assert rank_correlation(varying, varying, weight) == pytest.approx(1)
