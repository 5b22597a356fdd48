"""Plots of a training run: what its steps were expected to gain, beside what was realised."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from odp_callbacks.analysis.run_curve import RunCurve, run_curve
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.plot_style import COLOURS, GREY, STYLE, WIDTH

EXPECTED, REWARD, SUCCESS = COLOURS[0], COLOURS[1], COLOURS[2]


def plot_realised(reports: Sequence[ProbeReport], confidence: float = 0.95) -> Figure | None:
    """Plot the summed step gain of a run with its interval, the reward of the batches, and the success of the probes.

    All three are changes since the start, so that they can be compared.

    Args:
        reports: Probes of one run, in their order.
        confidence: Level of the intervals of the success rate, in (0, 1).

    Returns:
        The plot; None if the records are of no run.
    """
    curve = run_curve(reports, confidence)
    if curve is None:
        return None
    with rc_context(STYLE):
        plot = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = plot.add_subplot()
        if len(curve.steps):
            axes.fill_between(curve.steps, curve.low, curve.high, color=EXPECTED, alpha=0.2, linewidth=0)
            axes.plot(curve.steps, curve.gain_sum, color=EXPECTED, linewidth=2, label="expected: sum of step gains")
            axes.plot(curve.steps, curve.reward_change, color=REWARD, linewidth=1, alpha=0.8, label="reward of a batch")
        steps, values, errors = _successes(curve)
        axes.errorbar(steps, values, yerr=errors, fmt="D", color=SUCCESS, capsize=3, label="success of a probe")
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("change since the start")
        plot.legend(frameon=False, fontsize=9, ncols=2, loc="outside upper left")
        return plot


def _successes(curve: RunCurve) -> tuple[list[float], list[float], list[list[float]]]:
    """Steps, changes of success and lengths of the error bars; a change without an interval has none."""
    values = [change.value for change in curve.success_change]
    ends = [(change.value - change.low, change.high - change.value) for change in curve.success_change]
    return curve.probe_steps.tolist(), values, np.nan_to_num(np.array(ends).T).tolist()
