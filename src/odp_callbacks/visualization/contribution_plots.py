"""Waterfalls of an update's contributions: by class of rollouts and depth, and by layer and kind of LoRA module."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.text import displayable
from odp_callbacks.update_records import CLASSES
from odp_callbacks.visualization.plot_style import GREY, STYLE, WIDTH
from odp_callbacks.visualization.wording import level

HELPS, HARMS = "#8073ac", "#e08214"
"""Colours of bars that go up and of bars that go down."""
PALE = 0.4
"""Opacity of a bar whose interval includes 0."""
PANEL_HEIGHT, LOW_PANEL_HEIGHT = 1.6, 1.1
"""Inches for each teacher: of few and of many."""
MAXIMUM_LABELS = 24
"""Bars up to which each has a label; with more, only every second, third ... of a group has one."""


@dataclass(frozen=True)
class _Group:
    """Bars of which each begins where the one before ends, and the sum that they end at.

    Attributes:
        labels: ``B`` labels.
        estimates: ``B`` tuples of the ``K`` teachers' contributions.
        sum_label: Label of the sum; empty for none.
        sums: The ``K`` teachers' sums, of which the intervals are drawn.
        restarts: Whether the first bar begins at 0, because it shows the same update in other parts.
    """

    labels: Sequence[str]
    estimates: Sequence[tuple[Estimate, ...]]
    sum_label: str = ""
    sums: tuple[Estimate, ...] = ()
    restarts: bool = False


def plot_contributions(analysis: Analysis) -> Figure | None:
    """Plot what the tokens of each class and window of depth contribute, one panel for each teacher.

    Each bar begins where the one before ends, so the last one ends at the contribution of the whole update. The sums of
    a class and of all rollouts have an interval.

    Args:
        analysis: Analysis of a report.

    Returns:
        The plot, or None if no influence of tokens was measured.
    """
    parts = analysis.depth_contributions
    if not parts:
        return None
    groups = [
        _Group([part.window for part in of_class], [part.estimates for part in of_class], f"all {split}", sums)
        for split in CLASSES
        if (of_class := [part for part in parts if part.split == split])
        for sums in [_update_contributions(analysis, split)]
    ]
    return _plot(analysis, groups, "depth of the tokens, in correct\nand then in incorrect rollouts")


def plot_module_contributions(analysis: Analysis) -> Figure | None:
    """Plot what each layer contributes, and then what each kind of module does, one panel for each teacher.

    Both add up to the contribution of the whole update.

    Args:
        analysis: Analysis of a report.

    Returns:
        The plot, or None if contributions were not measured by module, have no numbers, or are of a single module.
    """
    of_modules = analysis.module_contributions
    if of_modules is None or len(of_modules.modules) < 2 or not of_modules.have_numbers:
        return None
    layers, kinds = (
        _Group(
            [part.split.removeprefix(prefix) for part in parts],
            [part.estimates for part in parts],
            restarts=restarts,
        )
        for prefix, parts, restarts in (
            ("layer ", of_modules.layers, False),
            ("module ", of_modules.kinds, True),
        )
    )
    return _plot(analysis, [layers, kinds], "layer, and then kind of module:\nthe same update in two ways")


def _update_contributions(analysis: Analysis, split: str) -> tuple[Estimate, ...]:
    """Contribution of a class of rollouts for each teacher."""
    summaries = [summary for summary in analysis.summaries() if summary.split == split]
    return tuple(summary.figures["update_contribution"] for summary in summaries)


def _plot(analysis: Analysis, groups: Sequence[_Group], axis_label: str) -> Figure:
    teachers = analysis.report.teachers
    wholes = _update_contributions(analysis, "all")
    panel_height = PANEL_HEIGHT if len(teachers) <= 4 else LOW_PANEL_HEIGHT
    with rc_context(STYLE):
        plot = Figure(figsize=(WIDTH, 1.4 + panel_height * len(teachers)), layout="constrained")
        panels = plot.subplots(len(teachers), sharex=True, sharey=True, squeeze=False)[:, 0]
        for teacher_index, (teacher, axes) in enumerate(zip(teachers, panels, strict=True)):
            labels = _draw_waterfall(axes, groups, teacher_index, wholes[teacher_index])
            axes.set_title(displayable(teacher, 40), fontsize=9, loc="left", pad=3)
            axes.axhline(0, color=GREY, linewidth=1)
            axes.margins(x=0.01)
        drawn = [position for position, label in enumerate(labels) if label]
        panels[-1].set_xticks(
            drawn, [labels[position] for position in drawn], rotation=60, ha="right", rotation_mode="anchor", fontsize=8
        )
        interval = f"{level(analysis.confidence)} interval"
        panels[-1].set_xlabel(
            f"{axis_label}\npurple: helps · orange: harms\npale: {interval} includes 0\nhollow: sums, with {interval}",
            fontsize=8,
        )
        plot.supylabel("contribution to the update gain", fontsize=9, color=GREY)
        return plot


def _draw_waterfall(axes: Axes, groups: Sequence[_Group], teacher_index: int, whole: Estimate) -> list[str]:
    """Draw one teacher's bars; returns their labels, which are empty for bars without one."""
    labels: list[str] = []
    total = 0.0
    bar_count = sum(len(group.labels) for group in groups)
    for index, group in enumerate(groups):
        total = 0.0 if group.restarts else total
        first_bar, group_total = len(labels), 0.0
        step = 1 if bar_count <= MAXIMUM_LABELS else max(1, len(group.labels) // (MAXIMUM_LABELS // 2))
        for place, (label, estimates) in enumerate(zip(group.labels, group.estimates, strict=True)):
            labels.append(displayable(label, 16) if place % step == 0 else "")
            estimate = estimates[teacher_index]
            value = estimate.value
            if not np.isfinite(value):  # an undefined contribution is no bar, and not one of height 0
                continue
            colour = HELPS if value > 0 else HARMS
            opacity = 1.0 if estimate.low > 0 or estimate.high < 0 else PALE
            axes.bar(
                len(labels) - 1,
                value,
                bottom=total,
                width=0.9,
                facecolor=(colour, opacity),
                edgecolor=colour,
                linewidth=0.8,
            )
            total, group_total = total + value, group_total + value
        if group.sum_label:
            _draw_sum(axes, len(labels), group_total, group.sums[teacher_index])
            labels.append(group.sum_label)
        axes.axvspan(first_bar - 0.5, len(labels) - 0.5, color=GREY, alpha=0.05 if index % 2 else 0.12)
    _draw_sum(axes, len(labels), total, whole)
    return [*labels, "whole update"]


def _draw_sum(axes: Axes, position: int, total: float, whole: Estimate) -> None:
    """Draw a sum from 0, with the interval of the contribution that it estimates; nothing if that is undefined."""
    if not np.isfinite(whole.value):
        return
    axes.bar(position, total, width=0.85, facecolor="none", edgecolor=GREY, linewidth=1.2)
    if np.isfinite([whole.low, whole.high]).all():
        axes.plot([position] * 2, [whole.low, whole.high], color=GREY, linewidth=1.5, marker="_", markersize=6)
