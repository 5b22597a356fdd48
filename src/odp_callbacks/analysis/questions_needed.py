"""How many times as many questions would tell a figure from 0, judging by its present interval."""

import math
from statistics import NormalDist

from odp_callbacks.analysis.jackknife import Estimate

POWER = 0.8
"""Probability with which the larger measurement decides, if the present estimate is the truth."""


def growth_to_decide(estimate: Estimate, confidence: float = 0.95) -> float:
    """How many times as many questions it would about take until the interval of a figure excludes 0.

    Intervals narrow with the square root of the number of questions. The present estimate stands for the truth, which
    it only estimates, so the number is a guide and no promise.

    Args:
        estimate: The figure with its interval.
        confidence: Level of the interval, in (0, 1).

    Returns:
        The factor: 1 if the interval excludes 0 already, infinity for an estimate of exactly 0, and NaN without an
        interval.

    Examples:
        >>> round(growth_to_decide(Estimate(0.2, -0.2, 0.6, questions=10, nodes=10)), 1)
        8.2
        >>> growth_to_decide(Estimate(0.2, 0.1, 0.3, questions=10, nodes=10))
        1.0
    """
    if math.isnan(estimate.low):
        return math.nan
    if estimate.low > 0 or estimate.high < 0:
        return 1.0
    if estimate.value == 0:
        return math.inf
    arm = estimate.value - estimate.low if estimate.value > 0 else estimate.high - estimate.value
    normal = NormalDist()
    surplus = 1 + normal.inv_cdf(POWER) / normal.inv_cdf((1 + confidence) / 2)
    return max(1.0, (surplus * arm / abs(estimate.value)) ** 2)


def rounded_up(count: float) -> int:
    """Round a number of questions up to two digits, which is more than it is known to.

    Examples:
        >>> rounded_up(7.2), rounded_up(61.0), rounded_up(1234.0)
        (8, 61, 1300)
    """
    whole = math.ceil(count)
    unit = int(10 ** max(0, len(str(whole)) - 2))
    return math.ceil(whole / unit) * unit
