"""Waterfall of an update's contributions: which class of rollouts and which depths its gain comes from."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from odp_callbacks.analysis.contributions import Contribution, contributions
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.text import displayable
from odp_callbacks.visualization.plot_style import GREY, STYLE, WIDTH
from odp_callbacks.visualization.wording import level

HELPS, HARMS = "#8073ac", "#e08214"
"""Colours of bars that go up and of bars that go down."""
PANEL_HEIGHT, LOW_PANEL_HEIGHT = 1.6, 1.1
"""Inches for each teacher: of few and of many."""


def plot_contributions(analysis: Analysis) -> Figure | None:
    """Plot what the tokens of each class and window of depth contribute, one panel for each teacher.

    Each bar begins where the one before ends, so the last one ends at the contribution of the whole update. The sums of
    a class and of all rollouts have an interval.

    Args:
        analysis: Analysis of a report.

    Returns:
        The plot, or None if no influence of tokens was measured.
    """
    report, influence = analysis.report, analysis.influence
    if influence is None or not (parts := contributions(report, influence)):
        return None
    wholes = {
        (summary.teacher, summary.split): summary.figures["update_contribution"] for summary in analysis.summaries()
    }
    panel_height = PANEL_HEIGHT if len(report.teachers) <= 4 else LOW_PANEL_HEIGHT
    with rc_context(STYLE):
        plot = Figure(figsize=(WIDTH, 1.1 + panel_height * len(report.teachers)), layout="constrained")
        panels = plot.subplots(len(report.teachers), sharex=True, sharey=True, squeeze=False)[:, 0]
        for teacher_index, (teacher, axes) in enumerate(zip(report.teachers, panels, strict=True)):
            labels = _draw_waterfall(
                axes, parts, teacher_index, {split: wholes[teacher, split] for split in ("correct", "incorrect", "all")}
            )
            axes.set_title(displayable(teacher, 40), fontsize=9, loc="left", pad=3)
            axes.axhline(0, color=GREY, linewidth=1)
            axes.margins(x=0.01)
        panels[-1].set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        panels[-1].set_xlabel(
            "depth of the tokens, in correct and then in incorrect rollouts\n"
            f"purple: helps · orange: harms · hollow: sums, with {level(analysis.confidence)} interval",
            fontsize=8,
        )
        plot.supylabel("contribution to the update gain", fontsize=9, color=GREY)
        return plot


def _draw_waterfall(
    axes: Axes, parts: Sequence[Contribution], teacher_index: int, wholes: dict[str, Estimate]
) -> list[str]:
    """Draw one teacher's bars; returns their labels."""
    labels: list[str] = []
    total = 0.0
    for split in ("correct", "incorrect"):
        of_class = [part for part in parts if part.split == split]
        first_bar, class_total = len(labels), 0.0
        for part in of_class:
            value = float(part.value[teacher_index])
            axes.bar(len(labels), value, bottom=total, width=0.9, color=HELPS if value > 0 else HARMS)
            labels.append(part.window)
            total, class_total = total + value, class_total + value
        if of_class:
            _draw_sum(axes, len(labels), class_total, wholes[split])
            labels.append(f"all {split}")
            axes.axvspan(first_bar - 0.5, len(labels) - 0.5, color=GREY, alpha=0.12 if split == "correct" else 0.05)
    _draw_sum(axes, len(labels), total, wholes["all"])
    return [*labels, "whole update"]


def _draw_sum(axes: Axes, position: int, total: float, whole: Estimate) -> None:
    """Draw a sum from 0, with the interval of the contribution that it estimates."""
    axes.bar(position, total, width=0.85, facecolor="none", edgecolor=GREY, linewidth=1.2)
    if np.isfinite([whole.low, whole.high]).all():
        axes.plot([position] * 2, [whole.low, whole.high], color=GREY, linewidth=1.5, marker="_", markersize=6)
