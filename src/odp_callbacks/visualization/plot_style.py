"""The style that all plots share: colours and markers of teachers, estimates with error bars, legend and SVG."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.text import shorten_middle

GREY = "#808080"
"""Readable on a light and on a dark background."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
"""Distinguishable for colour-blind readers; most after Okabe and Ito. Each teacher also has a marker of its own."""
MARKERS = "osD^vPX*"
WIDTH = 5.0
"""Inches. TensorBoard scales a picture down to its card, so the text of a wider one would be too small."""
LEGEND_CHARACTERS = 48
"""Characters that fit in one row of the legend, on a card of TensorBoard as well."""
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "odp-callbacks", "font.size": 10, "text.color": GREY,
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, "font.family": "sans-serif",
}  # fmt: skip


def colour_of(teacher_index: int) -> str:
    """Colour of a teacher; colours repeat after eight teachers."""
    return COLOURS[teacher_index % len(COLOURS)]


def marker_of(teacher_index: int) -> str:
    """Marker of a teacher; markers repeat after eight teachers."""
    return MARKERS[teacher_index % len(MARKERS)]


def uncorrected_where_withheld(estimate: Estimate) -> Estimate:
    """Replace a withheld estimate by its value before the noise correction, which has no interval."""
    if np.isfinite(estimate.value) or not np.isfinite(estimate.uncorrected):
        return estimate
    return replace(estimate, value=estimate.uncorrected, low=np.nan, high=np.nan)


def draw_estimate(axes: Axes, estimate: Estimate, position: float, teacher_index: int, *, horizontal: bool) -> None:
    """Draw an estimate with its interval as an error bar; without an interval, the marker is hollow.

    Args:
        axes: The axes to draw on.
        estimate: The estimate.
        position: Coordinate on the other axis.
        teacher_index: Index of the teacher, which determines colour and marker.
        horizontal: Whether the value is drawn along the x-axis.
    """
    value, low, high = estimate.value, estimate.low, estimate.high
    error_bar = [[max(0.0, value - low)], [max(0.0, high - value)]] if np.isfinite([value, low, high]).all() else None
    x, y = (value, position) if horizontal else (position, value)
    axes.errorbar(
        [x],
        [y],
        xerr=error_bar if horizontal else None,
        yerr=None if horizontal else error_bar,
        fmt=marker_of(teacher_index),
        color=colour_of(teacher_index),
        capsize=3,
        markersize=6,
        markerfacecolor=colour_of(teacher_index) if error_bar else "none",
    )


def axes_or_new(axes: Axes | None, height: float) -> Axes:
    """Return the axes to draw on: those of the caller, or the only ones of a new plot.

    Args:
        axes: The caller's; None for new ones.
        height: Of a new plot, in inches.
    """
    return Figure(figsize=(WIDTH, height), layout="constrained").add_subplot() if axes is None else axes


def plot_of(axes: Axes) -> Figure:
    """The plot that axes belong to."""
    plot = axes.get_figure(root=True)
    assert plot is not None, "axes are a part of a plot"
    return plot


def draw_legend(plot: Figure | Axes, labels: Sequence[str]) -> None:
    """Draw the teachers' legend above the axes, in as many columns as fit.

    Args:
        plot: The plot; or axes, if they are the caller's, who may have others in the same plot.
        labels: One label for each teacher.
    """
    handles = [
        Line2D([], [], ls="", marker=marker_of(teacher_index), color=colour_of(teacher_index))
        for teacher_index in range(len(labels))
    ]
    column_count = max(1, min(4, len(labels), LEGEND_CHARACTERS // (max(map(len, labels)) + 6)))
    if isinstance(plot, Axes):
        plot.legend(handles, labels, frameon=False, fontsize=9)
    else:
        plot.legend(handles, labels, frameon=False, fontsize=9, ncols=column_count, loc="outside upper left")


def draw_teacher_legend(plot: Figure | Axes, teachers: Sequence[str]) -> None:
    """Draw a legend of the teachers' names."""
    draw_legend(plot, [shorten_middle(teacher) for teacher in teachers])


def to_svg(plot: Figure) -> str:
    """Render a plot as SVG for the HTML page: with a transparent background, and text as text."""
    svg_buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with rc_context(STYLE):
            plot.savefig(svg_buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg_markup = svg_buffer.getvalue()
    return svg_markup[svg_markup.index("<svg") :]
