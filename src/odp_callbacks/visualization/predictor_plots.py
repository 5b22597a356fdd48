"""What predicts where a teacher helps: maps of rank correlations; and the student's success along depth."""

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from odp_callbacks.analysis.correlations import Correlations, correlations, measured_targets
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.predictors import NODE_PREDICTORS
from odp_callbacks.analysis.success_by_depth import success_by_depth
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.text import displayable
from odp_callbacks.visualization.plot_style import GREY, STYLE, WIDTH, draw_estimate, draw_legend
from odp_callbacks.visualization.wording import figure_title, level

MAXIMUM_NUMBERS = 12
"""Cells in a row of all maps up to which each has room for its number."""
SMALLEST_SCALE = 0.2
"""Correlation of the strongest colour, at least: smaller ones are to look small."""


def plot_predictors(analysis: Analysis) -> Figure | None:
    """Plot how each cheap predictor correlates with alignment, gain and influence, for each teacher.

    A number is bold where the interval of the correlation excludes 0. Of many teachers, dots say where it does, and
    there are no numbers. A cell is empty where there is no correlation.

    Args:
        analysis: Analysis of a report.

    Returns:
        The plot, or None if no correlation exists.
    """
    report = analysis.report
    by_target = {
        target: _existing(correlations(report, analysis.confidence, target)) for target in measured_targets(report)
    }
    by_target = {target: estimates for target, estimates in by_target.items() if estimates}
    if not by_target:
        return None
    numbers = [(name, abs(one.value)) for estimates in by_target.values() for (_, name), one in estimates.items()]
    names = [name for name in NODE_PREDICTORS if name in dict(numbers)]
    scale = max(SMALLEST_SCALE, *(size for _, size in numbers))
    has_room = len(by_target) * len(report.teachers) <= MAXIMUM_NUMBERS
    with rc_context(STYLE):
        plot = Figure(figsize=(WIDTH, 1.9 + 0.22 * len(names)), layout="constrained")
        maps = plot.subplots(1, len(by_target), sharey=True, squeeze=False)[0]
        for axes, (target, estimates) in zip(maps, by_target.items(), strict=True):
            _draw_map(axes, estimates, report.teachers, names, scale, has_room)
            axes.set_title(figure_title(target), fontsize=9, pad=4)
        maps[0].set_yticks(np.arange(len(names)) + 0.5, [_label(name) for name in names], fontsize=8)
        maps[0].invert_yaxis()
        mark = "bold" if has_room else "dot"
        note = f"purple: +{scale:.2f}, orange: -{scale:.2f}\n{mark}: {level(analysis.confidence)} interval excludes 0"
        plot.supxlabel(note, fontsize=8, color=GREY)
        return plot


def plot_success_by_depth(analysis: Analysis) -> Figure | None:
    """Plot the student's success over windows of depth, on correct and on incorrect rollouts.

    Args:
        analysis: Analysis of a report.

    Returns:
        The plot, or None without nodes.
    """
    estimates: dict[tuple[str, str], Estimate] = {
        (split, window): estimate
        for split, window, estimate in success_by_depth(analysis.report, analysis.confidence)
        if split != "all"
    }
    if not estimates:
        return None
    windows = sorted({window for _, window in estimates}, key=lambda window: int(window.split("-")[0]))
    splits = ("correct", "incorrect")
    with rc_context(STYLE):
        plot = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = plot.add_subplot()
        for index, split in enumerate(splits):
            for place, window in enumerate(windows):
                if (split, window) in estimates:
                    draw_estimate(
                        axes, estimates[split, window], place + 0.1 * (2 * index - 1), index, horizontal=False
                    )
        axes.set_xticks(range(len(windows)), windows)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("response token")
        axes.set_ylabel("success from there on")
        draw_legend(plot, [f"{split} rollouts" for split in splits])
        return plot


def _draw_map(
    axes: Axes, estimates: Correlations, teachers: tuple[str, ...], names: list[str], scale: float, has_room: bool
) -> None:
    """Draw the correlations of one target: predictors from top to bottom, teachers from left to right."""
    values = np.array([[_value(estimates, teacher, name) for teacher in teachers] for name in names])
    axes.pcolormesh(
        np.ma.masked_invalid(values), cmap="PuOr", vmin=-scale, vmax=scale, edgecolor=GREY, lw=0.3
    )  # fmt: skip
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        estimate, value = estimates[teachers[column], names[row]], float(values[row, column])
        is_sure = estimate.low > 0 or estimate.high < 0
        colour = "white" if abs(value) > 0.6 * scale else "black"
        text = f"{value:+.2f}".replace("0.", ".") if has_room else "•" if is_sure else ""
        axes.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6, color=colour,
            fontweight="bold" if is_sure else "normal",
        )  # fmt: skip
    labels = [displayable(teacher, 16) for teacher in teachers]
    axes.set_xticks(np.arange(len(teachers)) + 0.5, labels, rotation=90, fontsize=7)


def _value(estimates: Correlations, teacher: str, name: str) -> float:
    return estimates[teacher, name].value if (teacher, name) in estimates else float("nan")


def _existing(estimates: Correlations) -> Correlations:
    """Those that have a number."""
    return {key: estimate for key, estimate in estimates.items() if np.isfinite(estimate.value)}


def _label(name: str) -> str:
    """A predictor's name, in the width of the axis."""
    return figure_title(name).replace("student mass on teacher", "student on teacher").replace(
        "teacher mass on student", "teacher on student"
    )  # fmt: skip
