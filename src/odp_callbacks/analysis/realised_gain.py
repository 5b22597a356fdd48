"""Predicted against realised: whether a step along a teacher's update changed success as its update gain said."""

from dataclasses import dataclass, replace
from math import isnan, nan

import numpy as np

from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.records import Floats


@dataclass(frozen=True)
class RealisedGain:
    """What a step along a teacher's update was predicted to change, and what it changed.

    Attributes:
        teacher: Name of the teacher.
        predicted: Predicted change of success: update gain times the length of the step.
        before: Success on held-out questions before the step.
        after: Success on the same questions after it.
        change: Realised change of success; its interval is that of paired differences.
        changes: ``(N,)``, change of each question.
    """

    teacher: str
    predicted: Estimate
    before: Estimate
    after: Estimate
    change: Estimate
    changes: Floats

    @property
    def surprise(self) -> Estimate:
        """Realised minus predicted change; the two are independent, because they rest on different questions."""
        return self.change.minus_independent(self.predicted)

    @property
    def agrees(self) -> bool | None:
        """Whether the interval of :attr:`surprise` contains 0; None without an interval."""
        surprise = self.surprise
        return None if isnan(surprise.low) else surprise.low <= 0 <= surprise.high


def realised_gain(
    teacher: str, update_gain: Estimate, length: float, before: Floats, after: Floats, confidence: float = 0.95
) -> RealisedGain:
    """Compare the update gain of a teacher with what a step along its update did.

    Args:
        teacher: Name of the teacher.
        update_gain: Its update gain, from other questions than ``before`` and ``after``.
        length: Euclidean length of the step.
        before: ``(N,)``, mean reward of each held-out question before the step.
        after: ``(N,)``, after the step.
        confidence: Level of the intervals, in (0, 1).

    Raises:
        ValueError: If ``before`` and ``after`` are not of the same questions.

    Examples:
        >>> gain = Estimate(0.5, 0.2, 0.8, questions=20, nodes=20)
        >>> found = realised_gain("solution", gain, 0.2, np.array([0.0, 0.5, 0.25]), np.array([0.25, 0.5, 0.5]))
        >>> round(found.predicted.value, 2), round(found.change.value, 2), found.agrees
        (0.1, 0.17, True)
    """
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(
            f"`before` and `after` must hold one number for each of the same questions, but have the shapes "
            f"{before.shape} and {after.shape}."
        )
    return RealisedGain(
        teacher,
        replace(update_gain.scaled(length), uncorrected=nan),
        mean_over_questions(before, confidence, (0.0, 1.0)),
        mean_over_questions(after, confidence, (0.0, 1.0)),
        mean_over_questions(after - before, confidence, (-1.0, 1.0)),
        after - before,
    )


def mean_over_questions(
    values: Floats, confidence: float = 0.95, bounds: tuple[float, float] | None = None
) -> Estimate:
    """Mean of one number for each question, with Student's interval.

    Args:
        values: ``(N,)``.
        confidence: Level of the interval, in (0, 1).
        bounds: Smallest and largest possible value.

    Examples:
        >>> mean = mean_over_questions(np.array([0.0, 1.0, 2.0]))
        >>> round(mean.value, 2), round(mean.low, 2), round(mean.high, 2)
        (1.0, -1.48, 3.48)
    """

    def mean(weights: Floats) -> Floats:
        return np.asarray(weights @ values / weights.sum(axis=-1))

    return jackknife(Estimator(mean, np.ones(len(values), bool), len(values), bounds=bounds), confidence)
