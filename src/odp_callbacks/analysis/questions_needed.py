"""How sure a figure's sign is, and how many times as many questions would decide it, judging by its interval."""

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
    return growth_to_repeat(estimate, confidence)


def growth_to_repeat(estimate: Estimate, confidence: float = 0.95) -> float:
    """How many times as many new questions a repetition would take to decide with probability :data:`POWER`.

    Args:
        estimate: The figure with its interval, decided or not; its value stands for the truth.
        confidence: Level of the interval, in (0, 1).

    Returns:
        The factor, at least 1; infinity for an estimate of exactly 0, and NaN without an interval.

    Examples:
        >>> round(growth_to_repeat(Estimate(0.2, 0.001, 0.4, questions=10, nodes=10)), 1)
        2.0
    """
    if math.isnan(estimate.low):
        return math.nan
    if estimate.value == 0:
        return math.inf
    normal = NormalDist()
    surplus = 1 + normal.inv_cdf(POWER) / normal.inv_cdf((1 + confidence) / 2)
    return max(1.0, (surplus * _inner_arm(estimate) / abs(estimate.value)) ** 2)


def decided_again(estimate: Estimate, confidence: float = 0.95) -> float:
    """In what share of repetitions, with as many new questions, the interval would exclude 0 on the same side.

    This is the power of the measurement if the present estimate is the truth. A figure whose interval just excludes 0
    is decided again in half of the repetitions only.

    Args:
        estimate: The figure with its interval.
        confidence: Level of the interval, in (0, 1).

    Returns:
        A share in [0, 1]; NaN without an interval.

    Examples:
        >>> decided_again(Estimate(0.2, 0.0, 0.4, questions=10, nodes=10))
        0.5
        >>> round(decided_again(Estimate(0.4, 0.2, 0.6, questions=10, nodes=10)), 3)
        0.975
    """
    if math.isnan(estimate.low):
        return math.nan
    arm = _inner_arm(estimate)
    if arm == 0:
        return 1.0
    normal = NormalDist()
    return normal.cdf(normal.inv_cdf((1 + confidence) / 2) * (abs(estimate.value) / arm - 1))


def _inner_arm(estimate: Estimate) -> float:
    """Length of the interval's arm that points to 0."""
    return estimate.value - estimate.low if estimate.value > 0 else estimate.high - estimate.value


def rounded_up(count: float) -> int:
    """Round a number of questions up to two digits, which is more than it is known to.

    Examples:
        >>> rounded_up(7.2), rounded_up(61.0), rounded_up(1234.0)
        (8, 61, 1300)
    """
    questions = math.ceil(count)
    unit = int(10 ** max(0, len(str(questions)) - 2))
    return math.ceil(questions / unit) * unit
