"""Plots of a probe's figures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization import plots
from tests.helpers.records import MakeReport, split
from tests.helpers.updates import update_only, with_update


def error_bar_lengths(plot: Any) -> list[float]:
    """Measure the error bars of a plot, in the order in which they were drawn."""
    lengths = []
    for container in plot.axes[0].containers:
        (bars,) = container[2]
        (segment,) = bars.get_segments()
        lengths.append(float(np.linalg.norm(segment[1] - segment[0])))
    return lengths


def test_a_withheld_alignment_is_shown_hollow_and_uncorrected(make_report: MakeReport) -> None:
    report = make_report(split)
    single = tuple(replace(node, count=np.array([1, 1]), total=node.total.round() / 4) for node in report.nodes)
    analysis = Analysis(replace(report, nodes=single))
    estimate = analysis.summaries("depth")[0].figures["gain_weighted_alignment"]
    assert np.isnan(estimate.value)
    plot = plots.plot_over_depth(analysis)
    (first, *_) = plot.axes[0].containers
    assert first[0].get_ydata() == pytest.approx(estimate.uncorrected)
    assert first[0].get_markerfacecolor() == "none"


def test_two_probes_of_one_name_are_still_two(make_report: MakeReport) -> None:
    low, high = (
        make_report(lambda correct, depth: (0.1, 0.1), noise=0.0),
        make_report(lambda correct, depth: (0.9, 0.9), noise=0.0),
    )
    plot = plots.plot_over_probes([("same", low), ("same", high)], 0.95)
    first, second, *_ = plot.axes[0].containers
    assert first[0].get_ydata() < second[0].get_ydata()


def test_an_80_percent_interval_is_drawn_narrower_than_a_95_percent_one(make_report: MakeReport) -> None:
    report = make_report(split)
    narrow, wide = Analysis(report, 0.8), Analysis(report, 0.95)
    pairs = [
        (plots.plot_gains(narrow.summaries(), report.teachers), plots.plot_gains(wide.summaries(), report.teachers)),
        (plots.plot_over_depth(narrow, "predicted_gain"), plots.plot_over_depth(wide, "predicted_gain")),
        (plots.plot_over_probes([("a", report)] * 2, 0.8), plots.plot_over_probes([("a", report)] * 2, 0.95)),
    ]
    for narrow_plot, wide_plot in pairs:
        lengths = list(zip(error_bar_lengths(narrow_plot), error_bar_lengths(wide_plot), strict=True))
        assert len(lengths) >= 2 * len(report.teachers)
        assert all(0 < short < long for short, long in lengths)


def test_the_plot_against_divergence_names_its_confidence_level(make_report: MakeReport) -> None:
    report = make_report(split)
    rng = np.random.default_rng(0)
    nodes = tuple(replace(node, predictors={**node.predictors, "reverse_kl": rng.random(2)}) for node in report.nodes)
    report, widths = replace(report, nodes=nodes), {}
    for confidence in (0.8, 0.95):
        plot = plots.plot_alignment_against_divergence(Analysis(report, confidence))
        assert f"{100 * confidence:g}% interval" in plot.axes[0].get_xlabel()
        (legend,) = plot.legends
        ends = [text.get_text().partition("(")[2].rstrip(")").split(" to ") for text in legend.get_texts()]
        widths[confidence] = [float(high) - float(low) for low, high in ends]
    assert len(widths[0.8]) == len(report.teachers)
    assert all(short < long for short, long in zip(widths[0.8], widths[0.95], strict=True))


def test_gains_are_those_of_the_update_where_it_was_measured(make_report: MakeReport) -> None:
    report = with_update(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1))
    summaries = Analysis(report).summaries()
    for figure, plot in (
        ("update_gain", plots.plot_gains(summaries, report.teachers)),
        ("predicted_gain", plots.plot_gains(summaries, report.teachers, "predicted_gain")),
    ):
        estimates = {(summary.split, summary.teacher): summary.figures[figure] for summary in summaries}
        expected = [
            estimates[split_name, teacher].value
            for split_name in ("all", "correct", "incorrect", "incorrect-correct")
            for teacher in report.teachers
        ]
        drawn = [float(container[0].get_xdata()[0]) for container in plot.axes[0].containers]
        assert drawn == pytest.approx(expected)
        assert figure.replace("_", " ") in plot.axes[0].get_xlabel()


def test_the_update_gain_is_drawn_over_probes(make_report: MakeReport) -> None:
    without = make_report(split)
    reports = [("0", without), *((str(k), update_only(without, lambda correct: (0.3, -0.2), seed=k)) for k in (1, 2))]
    plot = plots.plot_over_probes(reports, 0.95)
    expected = [
        summary.figures["update_gain"].value
        for teacher in without.teachers
        for _, report in reports[1:]
        for summary in Analysis(report).summaries()
        if (summary.teacher, summary.split) == (teacher, "all")
    ]
    drawn = [float(container[0].get_ydata()[0]) for container in plot.axes[0].containers]
    assert drawn == pytest.approx(expected), "a probe that did not measure it has no marker"
    assert plot.axes[0].get_ylabel() == "update gain"
