"""Intervals: the jackknife over questions, for any smooth function of sums over questions."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from odp_callbacks.records import Floats

FEWEST_QUESTIONS = 3
"""With fewer an interval would not keep its promise."""


@dataclass(frozen=True)
class Estimate:
    """One number with its interval.

    Attributes:
        value: The estimate; NaN where nothing defines it, or where it is withheld.
        low: Lower end of the interval; NaN where there are too few questions for one.
        high: Upper end.
        questions: How many questions it rests on.
        nodes: How many nodes.
        uncorrected: The estimate before its correction for noise, where it has one.
        note: Why value or interval are missing, or what was done to them; empty for most.
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


@dataclass(frozen=True)
class Estimator:
    """A figure before its interval.

    Attributes:
        function: From question weights ``(..., m)``, 1 for a question that counts and 0 for one that does not, to the
            figure ``(...)``.
        questions: ``(m,)`` bool, those that the figure rests on.
        nodes: How many nodes it rests on.
        uncorrected: The estimate before its correction for noise.
        withheld: Why there is no figure; empty if there is one.
        ends: Range of the figure, if it has one.
        parts: The two figures of which this is the difference.
    """

    function: Callable[[Floats], Floats]
    questions: np.ndarray[tuple[int], np.dtype[np.bool_]]
    nodes: int
    uncorrected: float = float("nan")
    withheld: str = ""
    ends: tuple[float, float] | None = None
    parts: tuple["Estimator", ...] = ()

    @property
    def support(self) -> int:
        """How many questions the figure rests on; the weaker part of a difference."""
        return min((part.support for part in self.parts), default=int(self.questions.sum()))

    @property
    def variance(self) -> float:
        """The delete-one jackknife's; NaN where leaving out one question leaves nothing."""
        m = int(self.questions.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            out = self.function(1 - np.eye(len(self.questions))[self.questions])
        return float((m - 1) / m * ((out - out.mean()) ** 2).sum())

    @property
    def freedom(self) -> float:
        """Degrees of freedom; of a difference by Welch and Satterthwaite, and not more than the questions give."""
        most = float(self.questions.sum()) - 1
        if not self.parts:
            return most
        spreads = [part.variance for part in self.parts]
        below = sum(s * s / part.freedom for s, part in zip(spreads, self.parts, strict=True))
        return min(most, sum(spreads) ** 2 / below) if below > 0 else most

    def __sub__(self, other: "Estimator") -> "Estimator":
        """The difference of two figures of the same questions, as one figure."""
        ends = None
        if self.ends is not None and other.ends is not None:
            ends = self.ends[0] - other.ends[1], self.ends[1] - other.ends[0]
        return Estimator(
            lambda weights: self.function(weights) - other.function(weights),
            self.questions | other.questions,
            min(self.nodes, other.nodes),
            self.uncorrected - other.uncorrected,
            self.withheld or other.withheld,
            ends,
            (self, other),
        )


def check_confidence(confidence: float) -> float:
    """The level, if it is one.

    Raises:
        ValueError: If it is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), but {confidence!r} was given.")
    return confidence


def jackknife(estimator: Estimator, confidence: float = 0.95) -> Estimate:
    """The figure with the delete-one jackknife's interval and Student's t.

    Nodes of one question are not independent, so questions are what is left out in turn. An interval is cut to the
    figure's range, which takes nothing from its coverage.

    Args:
        estimator: The figure.
        confidence: In (0, 1).

    Examples:
        >>> import numpy as np
        >>> values = np.array([0.0, 1.0, 2.0])
        >>> f = jackknife(Estimator(lambda w: w @ values / w.sum(-1), np.ones(3, bool), nodes=3))
        >>> round(f.value, 2), round(f.low, 2), round(f.high, 2)
        (1.0, -1.48, 3.48)
    """
    support = estimator.support
    blank = Estimate(np.nan, np.nan, np.nan, support, estimator.nodes, estimator.uncorrected)
    if estimator.withheld:
        return replace(blank, note=estimator.withheld)
    if estimator.nodes == 0 or support == 0:
        return replace(blank, note="no node")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(estimator.function(np.ones(len(estimator.questions))))
    if not np.isfinite(value):
        return replace(blank, note="too noisy")
    if support < FEWEST_QUESTIONS:
        note = "one question" if support == 1 else f"{support} questions"
        return _cut(replace(blank, value=value, note=note), estimator.ends)
    variance = estimator.variance
    if not np.isfinite(variance):
        return _cut(replace(blank, value=value, note="one question"), estimator.ends)
    half = float(stats.t.ppf((1 + confidence) / 2, estimator.freedom) * np.sqrt(variance))
    return _cut(replace(blank, value=value, low=value - half, high=value + half), estimator.ends)


def _cut(figure: Estimate, ends: tuple[float, float] | None) -> Estimate:
    """Keep to the range, and say so where the estimate itself lay outside."""
    if ends is None:
        return figure
    low, high = ends
    value = float(np.clip(figure.value, low, high))
    note = figure.note if value == figure.value else f"cut to {value:+g}"
    bottom, top, half = figure.low, figure.high, figure.half_width
    # Where all of the interval lies outside, its length is kept: the truth cannot be there.
    if bottom > high:
        bottom = high - half
    elif top < low:
        top = low + half
    return replace(
        figure, value=value, low=float(np.clip(bottom, low, high)), high=float(np.clip(top, low, high)), note=note
    )
