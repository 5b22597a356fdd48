"""Spearman's rank correlation of weighted samples."""

import numpy as np

from odp_callbacks.records import Floats


class RankedColumn:
    """A column whose order is found once, so that ranks under other weights need no sorting.

    Args:
        values: ``(N,)``, finite.

    Examples:
        >>> RankedColumn(np.array([3.0, 1.0, 3.0])).ranks(np.ones(3)).tolist()  # up to a constant
        [2.0, 0.5, 2.0]
    """

    def __init__(self, values: Floats) -> None:
        distinct, self._level = np.unique(values, return_inverse=True)
        self._level = self._level.reshape(-1)
        self._levels = len(distinct)

    def ranks(self, weight: Floats) -> Floats:
        """Ranks of a sample in which a value stands for as many as its weight; equal values share their mean rank.

        Args:
            weight: ``(N,)``, not negative.
        """
        total = np.bincount(self._level, weight, minlength=self._levels)
        ranks: Floats = (np.cumsum(total) - total / 2)[self._level]
        return ranks


def rank_correlation(first: RankedColumn, second: RankedColumn, weight: Floats) -> float:
    """Spearman's rank correlation: Pearson's of the ranks.

    With weights it estimates the correlation of the population that the sample was drawn from with unequal
    probabilities: the weight of a value is the inverse of its probability.

    Args:
        first: Of ``N`` values.
        second: Of ``N`` values.
        weight: ``(N,)``, not negative.

    Returns:
        In [-1, 1]; NaN where one of the two does not vary.

    Examples:
        >>> column = RankedColumn(np.array([1.0, 2.0, 3.0]))
        >>> round(rank_correlation(column, RankedColumn(np.array([1.0, 4.0, 2.0])), np.ones(3)), 3)
        0.5
    """
    total = weight.sum()
    if not total > 0:
        return float("nan")
    centred = [(ranks := column.ranks(weight)) - weight @ ranks / total for column in (first, second)]
    spread = float(np.sqrt((weight @ centred[0] ** 2) * (weight @ centred[1] ** 2)))
    # Rounding leaves a little spread in a column that does not vary.
    if not spread > 1e-12 * total**3:
        return float("nan")
    return float((weight * centred[0]) @ centred[1] / spread)
