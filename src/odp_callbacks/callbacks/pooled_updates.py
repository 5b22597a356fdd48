"""Update gain pooled over the probes of a training, with intervals that are valid at every probe."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import combinations
from typing import Any

from odp_callbacks.analysis.confidence_sequences import ConfidenceSequence
from odp_callbacks.analysis.jackknife import Estimator
from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT, UPDATE_CLASSES
from odp_callbacks.analysis.update_gain import EQUAL_REWARDS, update_gain
from odp_callbacks.records import ProbeReport


class PooledUpdates:
    """Takes each probe's update gain, of every teacher and pair of teachers on every split.

    Args:
        decay: Share of the earlier probes' weight that is kept at each probe, in (0, 1].
        confidence: Probability that the intervals of all probes together hold what they estimate, in (0, 1).
    """

    def __init__(self, decay: float, confidence: float) -> None:
        self.decay, self.confidence = decay, confidence
        self.sequences: dict[str, ConfidenceSequence] = {}

    def observe(self, report: ProbeReport) -> dict[str, float]:
        """Add a probe.

        Args:
            report: Of the probe.

        Returns:
            ``odp/pooled/update_gain/<teacher>/<split>`` and the ends of its interval; none if no update was measured.
        """
        metrics: dict[str, float] = {}
        for name, estimator in gain_estimators(report):
            sequence = self.sequences.setdefault(name, ConfidenceSequence(self.decay))
            # Where all rewards are equal, the measured gain is 0. To leave it out would bias the mean.
            if estimator.withheld in ("", EQUAL_REWARDS):
                sequence.add(estimator.value, estimator.variance, estimator.degrees_of_freedom)
            for ending, number in zip(("", "_low", "_high"), sequence.interval(self.confidence), strict=True):
                metrics[f"odp/pooled/update_gain{ending}/{name}"] = number
        return metrics

    def clear(self) -> None:
        """Forget all probes: another training has started."""
        self.sequences = {}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps, in plain Python."""
        return {name: sequence.state() for name, sequence in self.sequences.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept.

        Raises:
            ValueError: If it holds something else, or was saved with another ``pooled_decay``.
        """
        loaded = {str(name): restored_sequence(sums) for name, sums in state.items()}
        for sequence in loaded.values():
            if sequence.decay != self.decay:
                raise ValueError(
                    f"it was saved with `pooled_decay` = {sequence.decay}, but it is {self.decay} in this training"
                )
        self.sequences = loaded


def restored_sequence(sums: Mapping[str, Any]) -> ConfidenceSequence:
    """A sequence from its state.

    Raises:
        ValueError: If a number is missing or is none.
    """
    numbers: dict[str, Any] = {field.name: sums.get(field.name) for field in fields(ConfidenceSequence)}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"`{name}` must be a number, but is {number!r}")
    return ConfidenceSequence(**numbers)


def gain_estimators(report: ProbeReport) -> Iterator[tuple[str, Estimator]]:
    """Update gain as ``<teacher>/<split>``, of each teacher and each pair of teachers; none without an update."""
    if not report.updates:
        return
    grams = [update.gram for update in report.updates]
    by_teacher: dict[str, dict[str, Estimator]] = {}
    for index, teacher in enumerate(report.teachers):
        of_split = {split: update_gain(grams, index, classes) for split, classes in UPDATE_CLASSES.items()}
        by_teacher[teacher] = of_split
        for split, estimator in of_split.items():
            yield f"{teacher}/{split}", estimator
        yield f"{teacher}/{INCORRECT_MINUS_CORRECT}", of_split["incorrect"] - of_split["correct"]
    for first, second in combinations(report.teachers, 2):
        for split in UPDATE_CLASSES:
            yield f"{first} - {second}/{split}", by_teacher[first][split] - by_teacher[second][split]
