"""Plots of a probe's figures: by class of rollouts, over depth, over the probes of a run, and against a divergence.

They are used in TensorBoard and in the HTML page, where they are SVG that reads on a light and on a dark background.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from odp_callbacks.analysis.correlations import correlations
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.node_estimates import DEFINED
from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT, SPLITS, Analysis, ClassSummary
from odp_callbacks.records import Floats, ProbeReport
from odp_callbacks.text import displayable, shorten_middle
from odp_callbacks.visualization.plot_style import (
    GREY,
    STYLE,
    axes_or_new,
    colour_of,
    draw_estimate,
    draw_legend,
    draw_teacher_legend,
    marker_of,
    plot_of,
    uncorrected_where_withheld,
)
from odp_callbacks.visualization.wording import class_title, figure_title, gain_figure, level

MAXIMUM_LABELS = 12
"""Labels on an axis; with more classes, only every second, third ... is labelled."""
MAXIMUM_POINTS = 2000
"""Points of a scatter plot: more would hide each other and make the page large."""
LINEAR_BELOW = 0.01
"""Nats below which the axis of a divergence is linear."""
GAINS = ("update_gain", "predicted_gain")
"""Figures that are no cosines, so that they have no largest value, and that need no correction for noise."""


def plot_gains(
    summaries: Sequence[ClassSummary], teachers: Sequence[str], figure: str | None = None, axes: Axes | None = None
) -> Figure:
    """Plot the gain of each teacher in each class of rollouts, and the difference of the classes, with intervals.

    Args:
        summaries: Of one report, by correctness.
        teachers: Names of its teachers.
        figure: Name of the figure; None for the update gain where it was measured, otherwise the predicted gain.
        axes: Where to draw; None for a plot of its own.
    """
    figure = figure or gain_figure(summaries)
    estimates = {(summary.teacher, summary.split): summary.figures[figure] for summary in summaries}
    splits = [split for split in (*SPLITS, INCORRECT_MINUS_CORRECT) if any(key[1] == split for key in estimates)]
    with rc_context(STYLE):
        given, axes = axes, axes_or_new(axes, 1.3 + 0.28 * len(teachers) * len(splits))
        rows_per_class = len(teachers) + 1
        for split_index, split in enumerate(splits):
            for teacher_index, teacher in enumerate(teachers):
                position = split_index * rows_per_class + teacher_index
                draw_estimate(axes, estimates[teacher, split], position, teacher_index, horizontal=True)
        class_centres = [index * rows_per_class + (len(teachers) - 1) / 2 for index in range(len(splits))]
        axes.set_yticks(
            class_centres, [class_title(split).replace(" minus correct ", "\nminus correct\n") for split in splits]
        )
        axes.set_ylim(len(splits) * rows_per_class - 1.4, -0.6)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_xlabel(f"harms  ←  0  →  helps\n{figure_title(figure)}: success\nprobability per unit step")
        draw_teacher_legend(given or plot_of(axes), teachers)
        return plot_of(axes)


def plot_over_depth(analysis: Analysis, figure: str = "gain_weighted_alignment", axes: Axes | None = None) -> Figure:
    """Plot a figure over windows of depth; a hollow marker shows it uncorrected where it is withheld.

    Args:
        analysis: Analysis of a report.
        figure: Name of the figure.
        axes: Where to draw; None for a plot of its own.
    """
    summaries = analysis.summaries("depth")
    labels = {summary.split: summary.split.removeprefix("depth ") for summary in summaries}
    return _plot_lines(summaries, figure, analysis.report.teachers, labels, "response token", axes)


def plot_over_probes(reports: Sequence[tuple[str, ProbeReport]], confidence: float) -> Figure:
    """Plot the gain on all rollouts, probe after probe: the update gain if any probe measured it.

    Args:
        reports: Reports of the same teachers, each with a name, which need not be unique.
        confidence: Level of the intervals, in (0, 1).
    """
    summaries = [
        replace(summary, split=str(index))
        for index, (_, report) in enumerate(reports)
        for summary in Analysis(report, confidence).summaries()
        if summary.split == "all"
    ]
    figure = gain_figure(summaries)
    measured = [summary for summary in summaries if figure in summary.figures]
    labels = {str(index): name for index, (name, _) in enumerate(reports)}
    return _plot_lines(measured, figure, reports[-1][1].teachers, labels, "probe")


def _plot_lines(
    summaries: Sequence[ClassSummary],
    figure: str,
    teachers: Sequence[str],
    labels: Mapping[str, str],
    axis_label: str,
    axes: Axes | None = None,
) -> Figure:
    """Plot a figure of each teacher as a line over classes; ``labels`` has a label for each class, in order."""
    estimates = {
        (summary.teacher, summary.split): uncorrected_where_withheld(summary.figures[figure]) for summary in summaries
    }
    with rc_context(STYLE):
        given, axes = axes, axes_or_new(axes, 2.8 + 0.2 * -(-len(teachers) // 4))
        for teacher_index, teacher in enumerate(teachers):
            # Error bars of several teachers would hide each other at the same place.
            offset = (teacher_index - (len(teachers) - 1) / 2) * min(0.12, 0.6 / len(teachers))
            points = {
                class_index + offset: estimates[teacher, split]
                for class_index, split in enumerate(labels)
                if (teacher, split) in estimates
            }
            values = [estimate.value for estimate in points.values()]
            axes.plot(list(points), values, color=colour_of(teacher_index), linewidth=1, alpha=0.6)
            for position, estimate in points.items():
                draw_estimate(axes, estimate, position, teacher_index, horizontal=False)
        axes.axhline(0, color=GREY, linewidth=1)
        if figure not in GAINS:
            axes.set_ylim(-1.05, 1.05)
        _label_classes(axes, list(labels.values()))
        hollow_because = "no interval" if figure in GAINS else "not corrected for noise"
        any_hollow = any(
            np.isfinite(estimate.value) and not np.isfinite(estimate.low) for estimate in estimates.values()
        )
        axes.set_xlabel(f"{axis_label} (hollow: {hollow_because})" if any_hollow else axis_label)
        axes.set_ylabel(figure_title(figure))
        draw_teacher_legend(given or plot_of(axes), teachers)
        return plot_of(axes)


def _label_classes(axes: Axes, labels: Sequence[str]) -> None:
    """Label the classes on the x-axis: rotated where the labels are long, and not all where they are many."""
    interval = max(1, -(-len(labels) // MAXIMUM_LABELS))
    drawn_labels = [displayable(label, 20) for label in labels][::interval]
    is_crowded = max(map(len, drawn_labels), default=0) * len(drawn_labels) > 50
    positions = range(0, len(labels), interval)
    axes.set_xticks(positions, drawn_labels, rotation=30 if is_crowded else 0, ha="right" if is_crowded else "center")


def plot_alignment_against_divergence(
    analysis: Analysis, predictor: str = "reverse_kl", axes: Axes | None = None
) -> Figure:
    """Plot each token's alignment against a divergence between student and teacher, with their correlation.

    A marker is filled where the interval of the token's alignment excludes 0.

    Args:
        analysis: Analysis of a report.
        predictor: Name of the divergence among a node's predictors.
        axes: Where to draw; None for a plot of its own.
    """
    report = analysis.report
    estimates = correlations(report, analysis.confidence)
    interval = -(-len(report.nodes) * len(report.teachers) // MAXIMUM_POINTS) or 1
    with rc_context(STYLE):
        given, axes = axes, axes_or_new(axes, 3.2 + 0.2 * len(report.teachers))
        largest_divergence = LINEAR_BELOW
        for teacher_index in range(len(report.teachers)):
            divergence = np.array([node.predictors[predictor][teacher_index] for node in report.nodes])
            defined = (analysis.status[:, teacher_index] == DEFINED) & np.isfinite(divergence)
            largest_divergence = max(largest_divergence, float(divergence[defined].max(initial=0)))
            drawn_tokens = defined & (np.arange(len(report.nodes)) % interval == 0)
            _scatter_tokens(axes, analysis, teacher_index, divergence, drawn_tokens)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_ylim(-1.05, 1.05)
        axes.set_ylabel("alignment")
        _scale_divergence_axis(axes, largest_divergence)
        subsampling_note = f"\none in {interval} tokens drawn" if interval > 1 else ""
        axes.set_xlabel(
            f"{figure_title(predictor)} divergence (nats)\n"
            f"filled: {level(analysis.confidence)} interval\nof the alignment excludes 0{subsampling_note}"
        )
        labels = [_describe_correlation(name, estimates[name, predictor]) for name in report.teachers]
        draw_legend(given or plot_of(axes), labels)
        return plot_of(axes)


def _scatter_tokens(
    axes: Axes,
    analysis: Analysis,
    teacher_index: int,
    divergence: Floats,
    drawn_tokens: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> None:
    alignment = analysis.token_alignment()[:, teacher_index]
    significant = analysis.significant_tokens()[:, teacher_index]
    teacher_colour = colour_of(teacher_index)
    for is_significant in (False, True):
        chosen_tokens = drawn_tokens & (significant == is_significant)
        axes.plot(
            divergence[chosen_tokens], alignment[chosen_tokens], marker_of(teacher_index), color=teacher_colour,
            markerfacecolor=teacher_colour if is_significant else "none", markersize=4, alpha=0.6,
            zorder=2 + is_significant,
        )  # fmt: skip


def _scale_divergence_axis(axes: Axes, largest_divergence: float) -> None:
    """Scale the x-axis linearly near 0, where student and teacher nearly agree, and logarithmically beyond."""
    axes.set_xscale("symlog", linthresh=LINEAR_BELOW)
    axes.set_xlim(-LINEAR_BELOW / 20, 1.3 * largest_divergence)
    powers = (10.0**exponent for exponent in range(round(np.log10(LINEAR_BELOW)), 3))
    tick_positions = [0.0, *(power for power in powers if power <= 1.3 * largest_divergence)]
    axes.set_xticks(tick_positions, [f"{tick_position:g}" for tick_position in tick_positions])
    axes.minorticks_off()


def _describe_correlation(teacher: str, estimate: Estimate) -> str:
    interval = f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"
    return f"{shorten_middle(teacher)}: correlation {interval if np.isfinite(estimate.value) else 'undefined'}"
