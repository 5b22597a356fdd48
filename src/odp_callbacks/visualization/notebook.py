"""A report in a notebook: what it shows of itself, and plots on axes of the caller's."""

from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from odp_callbacks.analysis.advice import advise
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.report_text import table_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("gain", "depth", "divergence")
"""Plots of a report that need one pair of axes."""


def plot_report(analysis: Analysis, kind: str = "gain", axes: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot a report on axes of the caller's, or on new ones of pyplot, which a notebook shows.

    Args:
        analysis: Analysis of a report.
        kind: ``"gain"``: of each teacher and class of rollouts; ``"depth"``: over depth, by update gain's contribution
            or by gain-weighted alignment; ``"divergence"``: each token's alignment against a divergence.
        axes: Where to draw; None for new axes.

    Returns:
        The figure and its axes, as torchmetrics' ``plot`` does.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is no such plot, or the report has not measured what it shows.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, but {kind!r} was given.")
    if kind != "gain" and not analysis.report.nodes:
        raise ValueError(
            f"`kind` is {kind!r}, which shows single tokens, but the report has measured none; give the probe a "
            '`budget`, or plot "gain".'
        )
    try:
        import matplotlib.pyplot

        from odp_callbacks.visualization import plots
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`plot` needs {error.name}; install it with: pip install 'odp-callbacks[report]'", name=error.name
        ) from error

    if axes is None:
        axes = matplotlib.pyplot.subplots(layout="constrained")[1]
    draw: dict[str, Callable[[], Figure]] = {
        "gain": lambda: plots.plot_gains(analysis.summaries(), analysis.report.teachers, axes=axes),
        "depth": lambda: plots.plot_over_depth(analysis, axes=axes),
        "divergence": lambda: plots.plot_alignment_against_divergence(analysis, axes=axes),
    }
    return draw[kind](), axes


def notebook_html(report: ProbeReport) -> str:
    """What a notebook shows of a report: what to do next, a picture of the gains, and the table.

    Without matplotlib there is no picture.

    Args:
        report: The report.

    Returns:
        HTML without scripts, whose texts are escaped.
    """
    analysis = Analysis(report, report.confidence)
    advice = advise(analysis)
    parts = [f"<p><strong>{escape(advice.sentence)}</strong></p>"]
    if advice.certainty:
        parts.append(f"<p>How sure: {escape(advice.certainty)}</p>")
    if report.updates or report.nodes:
        parts += _picture(analysis)
        parts.append(f"<details><summary>All figures</summary><pre>{escape(table_text(analysis))}</pre></details>")
    return f"<div class='odp-report'>{''.join(parts)}</div>"


def _picture(analysis: Analysis) -> list[str]:
    """The picture of the gains as SVG, if matplotlib is there."""
    try:
        from odp_callbacks.visualization.plot_style import to_svg
        from odp_callbacks.visualization.plots import plot_gains
    except ImportError:  # matplotlib belongs to the extra `tensorboard`
        return []
    return [to_svg(plot_gains(analysis.summaries(), analysis.report.teachers))]
