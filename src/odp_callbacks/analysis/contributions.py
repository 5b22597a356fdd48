"""Influences of a report's tokens as one table, and what each class and window of depth contributes to the update."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.classes import depth_windows
from odp_callbacks.analysis.fold_contributions import contribution_of_tokens
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.token_influence import influence_intervals
from odp_callbacks.analysis.update_gain import withheld_because
from odp_callbacks.records import Floats, ProbeReport
from odp_callbacks.update_records import CLASSES

SATURATION = 0.95
"""Share of the tokens whose influence lies within the scale of colours; the largest few would make the others pale."""


@dataclass(frozen=True)
class ReportInfluence:
    """Influence of all ``T`` response tokens of a report for ``K`` teachers, rollout after rollout.

    Attributes:
        starts: ``(R + 1,)``, index of the first token of each of the ``R`` rollouts.
        depth: ``(T,)``, position in the response.
        value: ``(T, K)``; NaN for tokens whose update was not measured.
        low: ``(T, K)``, lower end of the interval; NaN where there is none.
        high: ``(T, K)``, upper end.
        weight: ``(T,)``, share of the token's measurement in the report: 1 if the report holds a single one.
    """

    starts: NDArray[np.int64]
    depth: NDArray[np.int64]
    value: Floats
    low: Floats
    high: Floats
    weight: Floats

    def tokens_of(self, rollout_index: int) -> slice:
        """Where the tokens of a rollout are."""
        return slice(int(self.starts[rollout_index]), int(self.starts[rollout_index + 1]))

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Whether the interval of a token's influence excludes 0, ``(T, K)``."""
        return (self.low > 0) | (self.high < 0)

    @property
    def scale(self) -> float:
        """Influence at which colours are saturated."""
        sizes = np.abs(self.value[np.isfinite(self.value)])
        return float(np.quantile(sizes, SATURATION) or sizes.max()) or 1.0 if sizes.size else 1.0


@dataclass(frozen=True)
class Contribution:
    """What the tokens of one class of rollouts and one window of depth contribute to the updates of ``K`` teachers.

    Attributes:
        split: Class of the rollouts, ``"correct"`` or ``"incorrect"``.
        window: Depths, such as ``"4-7"``.
        estimates: ``K`` sums of the tokens' influences, each with its interval.
        tokens: Number of tokens.
    """

    split: str
    window: str
    estimates: tuple[Estimate, ...]
    tokens: int

    @property
    def value(self) -> Floats:
        """The sums, ``(K,)``."""
        return np.array([estimate.value for estimate in self.estimates])


def report_influence(report: ProbeReport, confidence: float = 0.95) -> ReportInfluence | None:
    """Collect the influences of all measurements of a report; None if there are none.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).
    """
    if not any(update.influence is not None for update in report.updates):
        return None
    lengths = [len(rollout.pieces) for rollout in report.rollouts]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    value, low, high = np.full((3, starts[-1], len(report.teachers)), np.nan)
    weight = np.ones(starts[-1])
    # Of a single group of questions there is no contribution, so that it has no weight either.
    questions = sum(float(update.gram.questions.sum()) for update in report.updates if update.gram.groups > 1)
    for update in report.updates:
        if update.influence is not None:
            places = starts[update.influence.rollout] + update.influence.depth
            intervals = influence_intervals(update.influence, confidence)
            has_figures = np.array(
                [not withheld_because([update.gram], teacher) for teacher in range(len(report.teachers))]
            )
            value[places], low[places], high[places] = (np.where(has_figures, part, np.nan) for part in intervals)
            weight[places] = float(update.gram.questions.sum()) / questions if questions else 1.0
    depth = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return ReportInfluence(starts, depth, value, low, high, weight)


def contributions(report: ProbeReport, influence: ReportInfluence, confidence: float = 0.95) -> list[Contribution]:
    """Sum influences by class and window of depth; together they make the contribution of the whole update.

    Args:
        report: A probe's report.
        influence: Of its tokens.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        Those of correct rollouts by depth, then those of incorrect ones; windows without tokens are left out.
    """
    correct = np.repeat([rollout.correct for rollout in report.rollouts], np.diff(influence.starts))
    measured = np.isfinite(influence.value).any(axis=1)
    return [
        Contribution(
            split, window, contribution_of_tokens(report, influence.starts, chosen, confidence), int(chosen.sum())
        )
        for split in CLASSES
        for window, in_window in depth_windows(influence.depth)
        if (chosen := in_window & measured & (correct == (split == "correct"))).any()
    ]
