"""The enrichment rule: which tokens of a node get targeted rollouts, and how many."""

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.records import Floats


def worth_enriching(student: Floats, teachers: Floats, threshold: float = 0.02) -> NDArray[np.bool_]:
    """Whether each token of a node is worth enriching: student or a teacher gives it more than the threshold.

    Tokens that only a teacher proposes are branches too. One tree serves all teachers, so a token that one of them
    proposes is enriched for all. Source: arXiv:2605.10889.

    Args:
        student: ``(..., V)``, probabilities of the student.
        teachers: ``(K, ..., V)``, probabilities of each teacher.
        threshold: The probability that must be exceeded.

    Returns:
        ``(..., V)``.

    Examples:
        >>> worth_enriching(np.array([0.97, 0.02, 0.01]), np.array([[0.9, 0.0, 0.1]])).tolist()
        [True, False, True]
    """
    chosen: NDArray[np.bool_] = (student > threshold) | (teachers > threshold).any(axis=0)
    return chosen


def missing_visits(visits: int, enriched_visits: int = 100) -> int:
    """The number of targeted rollouts that bring a token to ``enriched_visits`` visits.

    Examples:
        >>> missing_visits(30), missing_visits(130)
        (70, 0)
    """
    return max(0, enriched_visits - visits)
