"""Confidence intervals by the delete-one jackknife over questions, for any smooth function of sums over questions."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.skewness import skewed_interval
from odp_callbacks.records import Floats

MINIMUM_QUESTIONS = 3
"""With fewer questions an interval would not reach its stated coverage, so none is given."""
MAXIMUM_PAIRS = 2048
"""Of many questions, about so many pairs are left out: their number grows with its square, and the variance of the
interactions is known to a few percent from these."""
FEW_INFORMATIVE = "few unequal rewards"
"""Why there is no interval: too few questions have rewards that differ, and rollouts of the class."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The estimate; NaN where it is undefined or withheld.
        low: Lower end of the interval; NaN where there are too few questions for an interval.
        high: Upper end of the interval.
        questions: Number of questions behind the estimate.
        nodes: Number of nodes behind the estimate.
        uncorrected: The estimate before its correction for noise; NaN for a figure that needs none.
        note: Why the value or the interval is missing, or how the value was changed; empty otherwise.
    """

    value: float
    low: float
    high: float
    questions: int
    nodes: int
    uncorrected: float = float("nan")
    note: str = ""

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    def scaled(self, factor: float) -> "Estimate":
        """The estimate times a number, which may be negative.

        Examples:
            >>> Estimate(0.2, 0.1, 0.4, questions=9, nodes=9).scaled(-2.0).low
            -0.8
        """
        value, *ends = (factor * end for end in (self.value, self.low, self.high))
        return replace(self, value=value, low=min(ends), high=max(ends))

    def minus_independent(self, other: "Estimate") -> "Estimate":
        """The difference from an estimate that rests on other questions.

        Examples:
            >>> Estimate(0.5, 0.2, 0.8, questions=9, nodes=9).minus_independent(Estimate(0.1, -0.3, 0.5, 9, 9)).high
            0.9
        """
        value, half_width = self.value - other.value, math.hypot(self.half_width, other.half_width)
        return replace(self, value=value, low=value - half_width, high=value + half_width)


@dataclass(frozen=True)
class Estimator:
    """A figure as a function of the questions that count; :func:`jackknife` turns it into an :class:`Estimate`.

    Attributes:
        statistic: Maps question weights ``(..., m)``, 1 for a question that counts and 0 for one that is left out, to
            the figure ``(...)``.
        questions: ``(m,)`` bool, the questions that have at least one node behind the figure.
        nodes: Number of nodes behind the figure.
        uncorrected: The estimate before its correction for noise.
        withheld: Why the figure is not reported; empty if it is.
        bounds: Smallest and largest possible value, if the figure has them.
        parts: For a difference, the two figures that it is the difference of.
        pairs: Whether the figure is a sum over pairs of questions. Its variance then gets a correction, see
            :attr:`variance`, and its interval is one for skewed figures.
        informative: For a figure over pairs, how many questions tell something: those with a success gradient and with
            rollouts of the class. None: all of them.
    """

    statistic: Callable[[Floats], Floats]
    questions: np.ndarray[tuple[int], np.dtype[np.bool_]]
    nodes: int
    uncorrected: float = float("nan")
    withheld: str = ""
    bounds: tuple[float, float] | None = None
    parts: tuple["Estimator", ...] = ()
    pairs: bool = False
    informative: int | None = None

    @property
    def question_count(self) -> int:
        """Number of questions behind the figure; for a difference, the smaller of its parts' numbers."""
        return min((part.question_count for part in self.parts), default=int(self.questions.sum()))

    @property
    def value(self) -> float:
        """The figure of all questions."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(self.statistic(np.ones(len(self.questions))))

    @property
    def variance(self) -> float:
        """Delete-one jackknife variance; NaN where leaving out a question leaves no node.

        For a figure over pairs of questions, the jackknife counts the variance of the pairs' own part twice. Leaving
        out two questions at a time measures that part (Efron and Stein, "The jackknife estimate of variance", 1981),
        and it is subtracted. The result is kept above half of the jackknife's, which it cannot undercut on average.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            leave_one_out = self.statistic(1 - np.eye(len(self.questions))[self.questions])
            squared_deviations = (leave_one_out - leave_one_out.mean()) ** 2
            question_count = len(leave_one_out)
            variance = float((question_count - 1) / question_count * squared_deviations.sum())
            if not self.pairs or question_count < 4:
                return variance
            pair_variance = self._pair_variance(leave_one_out)
        return max(variance - pair_variance, variance / 2) if np.isfinite(pair_variance) else variance

    def _pair_variance(self, leave_one_out: Floats) -> float:
        """The part of the jackknife variance that comes from pairs, measured by leaving out two questions."""
        count = len(leave_one_out)
        first, second = question_pairs(count)
        weights = np.ones((len(first), len(self.questions)))
        places = np.flatnonzero(self.questions)
        weights[np.arange(len(first)), places[first]] = 0
        weights[np.arange(len(first)), places[second]] = 0
        of_all = float(self.statistic(np.ones(len(self.questions))))
        leave_two_out = self.statistic(weights)
        interactions = (
            count * of_all - (count - 1) * (leave_one_out[first] + leave_one_out[second]) + (count - 2) * leave_two_out
        )
        return float(((interactions - interactions.mean()) ** 2).mean() / 2)

    @property
    def skewness(self) -> float:
        """Skewness of the questions' influences on the figure, which the jackknife measures."""
        with np.errstate(divide="ignore", invalid="ignore"):
            leave_one_out = self.statistic(1 - np.eye(len(self.questions))[self.questions])
            influences = leave_one_out.mean() - leave_one_out
            return float((influences**3).mean() / (influences**2).mean() ** 1.5)

    @property
    def degrees_of_freedom(self) -> float:
        """Degrees of freedom of Student's t.

        One less than the number of questions. A figure over pairs has at most one for each question that tells
        something: the others add nothing to the sum of squares. Any other difference takes those of Welch and
        Satterthwaite if they are fewer.
        """
        maximum = float(self.questions.sum()) - 1
        if self.pairs:
            return maximum if self.informative is None else min(maximum, float(self.informative))
        if not self.parts:
            return maximum
        variances = [part.variance for part in self.parts]
        denominator = sum(
            variance * variance / part.degrees_of_freedom for variance, part in zip(variances, self.parts, strict=True)
        )
        return min(maximum, sum(variances) ** 2 / denominator) if denominator > 0 else maximum

    def __sub__(self, other: "Estimator") -> "Estimator":
        """The difference of two figures of the same report, as one figure."""
        bounds = None
        if self.bounds is not None and other.bounds is not None:
            bounds = self.bounds[0] - other.bounds[1], self.bounds[1] - other.bounds[0]
        return Estimator(
            lambda weights: self.statistic(weights) - other.statistic(weights),
            self.questions | other.questions,
            min(self.nodes, other.nodes),
            self.uncorrected - other.uncorrected,
            self.withheld or other.withheld,
            bounds,
            (self, other),
            self.pairs or other.pairs,
            min((n for n in (self.informative, other.informative) if n is not None), default=None),
        )


def question_pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of different questions: all of them, or a balanced part of about :data:`MAXIMUM_PAIRS`.

    In the part every question is in equally many pairs, with those that follow it in a circle.

    Args:
        count: Number of questions, at least 2.

    Examples:
        >>> question_pairs(3)
        (array([0, 0, 1]), array([1, 2, 2]))
    """
    if count * (count - 1) // 2 <= MAXIMUM_PAIRS:
        return np.triu_indices(count, 1)
    offsets = np.arange(1, max(1, MAXIMUM_PAIRS // count) + 1)
    first = np.repeat(np.arange(count), len(offsets))
    return first, (first + np.tile(offsets, count)) % count


def check_confidence(confidence: float) -> float:
    """Return the confidence level if it is valid.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), but {confidence!r} was given.")
    return confidence


def jackknife(estimator: Estimator, confidence: float = 0.95) -> Estimate:
    """Estimate a figure with its delete-one jackknife interval.

    Nodes of one question are not independent, so each question is left out in turn. The interval uses Student's t and
    is clipped to the figure's bounds, which cannot lower its coverage.

    Args:
        estimator: The figure.
        confidence: Level of the interval, in (0, 1).

    Returns:
        The estimate. Its interval is NaN with fewer than :data:`MINIMUM_QUESTIONS` questions.

    Examples:
        >>> import numpy as np
        >>> values = np.array([0.0, 1.0, 2.0])
        >>> mean = Estimator(lambda weights: weights @ values / weights.sum(-1), np.ones(3, bool), nodes=3)
        >>> estimate = jackknife(mean)
        >>> round(estimate.value, 2), round(estimate.low, 2), round(estimate.high, 2)
        (1.0, -1.48, 3.48)
    """
    question_count = estimator.question_count
    blank = Estimate(np.nan, np.nan, np.nan, question_count, estimator.nodes, estimator.uncorrected)
    if estimator.withheld:
        return replace(blank, note=estimator.withheld)
    if estimator.nodes == 0 or question_count == 0:
        return replace(blank, note="no node")
    value = estimator.value
    if not np.isfinite(value):
        return replace(blank, note="too noisy")
    if question_count < MINIMUM_QUESTIONS:
        note = "one question" if question_count == 1 else f"{question_count} questions"
        return _clip(replace(blank, value=value, note=note), estimator.bounds)
    if estimator.informative is not None and estimator.informative < MINIMUM_QUESTIONS:
        return _clip(replace(blank, value=value, note=FEW_INFORMATIVE), estimator.bounds)
    variance = estimator.variance
    if not np.isfinite(variance):
        note = "too noisy" if estimator.pairs else "one question"
        return _clip(replace(blank, value=value, note=note), estimator.bounds)
    from scipy import stats  # importing it takes most of a second

    quantile = stats.t.ppf((1 + confidence) / 2, estimator.degrees_of_freedom)
    standard_error = float(np.sqrt(variance))
    low, high = value - quantile * standard_error, value + quantile * standard_error
    if estimator.pairs and variance > 0:
        low, high = skewed_interval(value, standard_error, estimator.skewness, question_count, quantile)
    return _clip(replace(blank, value=value, low=float(low), high=float(high)), estimator.bounds)


def _clip(estimate: Estimate, bounds: tuple[float, float] | None) -> Estimate:
    """Clip value and interval to the bounds; the note says so if the value lay outside."""
    if bounds is None:
        return estimate
    minimum, maximum = bounds
    value = float(np.clip(estimate.value, minimum, maximum))
    note = estimate.note if value == estimate.value else f"cut to {value:+g}"
    lower_end, upper_end, half_width = estimate.low, estimate.high, estimate.half_width
    # An interval that lies entirely outside keeps half its length inside, instead of shrinking to a point.
    if lower_end > maximum:
        lower_end = maximum - half_width
    elif upper_end < minimum:
        upper_end = minimum + half_width
    return replace(
        estimate,
        value=value,
        low=float(np.clip(lower_end, minimum, maximum)),
        high=float(np.clip(upper_end, minimum, maximum)),
        note=note,
    )
