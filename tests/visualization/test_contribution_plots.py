"""The waterfall of an update's contributions."""

import numpy as np
import pytest

from odp_callbacks.analysis.contributions import contributions
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization.contribution_plots import plot_contributions
from tests.helpers.records import MakeReport, many_teachers, split
from tests.helpers.updates import update_only, with_texts


def test_bars_begin_where_the_one_before_ends_and_add_up(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1))
    analysis = Analysis(report)
    assert analysis.influence is not None
    parts = contributions(report, analysis.influence)
    plot = plot_contributions(analysis)
    assert plot is not None
    labels = [label.get_text() for label in plot.axes[-1].get_xticklabels()]
    windows = ["0", "1", "2-3", "4-7"]
    assert labels == [*windows, "all correct", *windows, "all incorrect", "whole update"]
    for teacher_index, axes in enumerate(plot.axes):
        bars = [container[0] for container in axes.containers]
        assert len(bars) == len(labels)
        values = iter(parts)
        end = 0.0
        for bar, label in zip(bars, labels, strict=True):
            if label in windows:
                value = next(values).value[teacher_index]
                assert bar.get_y() == pytest.approx(end)
                assert bar.get_height() == pytest.approx(value)
                assert (bar.get_facecolor()[2] > bar.get_facecolor()[0]) == (value > 0), "purple helps"
                end += value
            else:
                assert bar.get_y() == 0
        assert bars[-1].get_height() == pytest.approx(end)
        assert bars[4].get_height() + bars[9].get_height() == pytest.approx(end)


def test_sums_have_the_interval_of_the_contribution(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1))
    for confidence in (0.8, 0.95):
        analysis = Analysis(report, confidence)
        plot = plot_contributions(analysis)
        assert plot is not None
        expected = {
            summary.split: summary.figures["update_contribution"]
            for summary in analysis.summaries()
            if summary.teacher == "far"
        }
        ends = [line.get_ydata() for line in plot.axes[1].lines if line.get_marker() == "_"]
        np.testing.assert_allclose(
            ends, [[expected[name].low, expected[name].high] for name in ("correct", "incorrect", "all")]
        )
        assert f"{100 * confidence:g}% interval" in plot.axes[-1].get_xlabel()


def test_many_teachers_and_long_responses_fit() -> None:
    report = update_only(with_texts(many_teachers(8), 3000), lambda correct: (0.1,) * 8)
    plot = plot_contributions(Analysis(report))
    assert plot is not None
    assert plot.get_size_inches()[1] < 12
    assert len(plot.axes) == 8
