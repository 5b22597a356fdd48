"""What the steps of a training run were expected to gain, and what was realised, from the records of its probes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odp_callbacks.analysis.estimators import success_rate
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.records import Floats, ProbeReport

RUN_CURVE = "run_curve"
"""Setting of a probe of a run that holds the step of the probe and the points of :func:`curve_setting`."""
COLUMNS = ("step", "gain_sum", "gain_sum_low", "gain_sum_high", "reward_change")
"""What is kept of each step that was followed (:mod:`~odp_callbacks.callbacks.step_curves`)."""


@dataclass(frozen=True)
class RunCurve:
    """Expected and realised gain of a run; everything is relative to the run's start.

    Attributes:
        steps: ``(n,)``, optimizer steps that were followed.
        gain_sum: ``(n,)``, the gain that all steps so far were expected to bring, in mean reward.
        low: ``(n,)``, lower end of its interval; NaN where there is none.
        high: ``(n,)``, upper end.
        reward_change: ``(n,)``, mean reward of the batch less that of the first batch.
        probe_steps: ``(p,)``, steps of the probes.
        success_change: ``p`` changes of the success rate since the first probe; the probes ask different questions, so
            that their errors are taken to be independent. That of the first one is 0, without an interval.
    """

    steps: Floats
    gain_sum: Floats
    low: Floats
    high: Floats
    reward_change: Floats
    probe_steps: Floats
    success_change: tuple[Estimate, ...]


def curve_setting(probe_step: int, points: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The setting :data:`RUN_CURVE` of a probe.

    Args:
        probe_step: The optimizer step of the probe.
        points: Figures of the steps that were followed since the probe before, by the names of :data:`COLUMNS`.

    Examples:
        >>> curve_setting(4, [{"step": 3, "gain_sum": 0.1, "reward_change": 0.25}])["gain_sum_low"]
        [None]
    """
    return {"at": probe_step, **{column: [point.get(column) for point in points] for column in COLUMNS}}


def run_curve(reports: Sequence[ProbeReport], confidence: float = 0.95) -> RunCurve | None:
    """Put together the curve of a run from the records of its probes.

    Args:
        reports: Probes of one run, in their order.
        confidence: Level of the intervals of the success rate, in (0, 1).

    Returns:
        The curve; None if the records are of no run, or of so little of one that there is no change to see.
    """
    of_run = [report for report in reports if isinstance(report.settings.get(RUN_CURVE), Mapping)]
    settings = [report.settings[RUN_CURVE] for report in of_run]
    steps, gain_sum, low, high, reward_change = (
        np.array([number for setting in settings for number in _numbers(setting.get(column))]) for column in COLUMNS
    )
    if len(of_run) < 2 and not len(steps):
        return None
    success = [success_rate(report, confidence) for report in of_run]
    return RunCurve(
        steps,
        gain_sum,
        low,
        high,
        reward_change,
        np.array([setting["at"] for setting in settings], float),
        tuple(later.minus_independent(success[0]) if index else _start(later) for index, later in enumerate(success)),
    )


def _numbers(values: object) -> list[float]:
    return [np.nan if value is None else float(value) for value in values] if isinstance(values, list) else []


def _start(success: Estimate) -> Estimate:
    return Estimate(0.0, np.nan, np.nan, success.questions, success.nodes)
