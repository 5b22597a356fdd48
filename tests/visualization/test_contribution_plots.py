"""The waterfall of an update's contributions."""

from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.contributions import contributions
from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.contribution_plots import PALE, plot_contributions, plot_module_contributions
from odp_callbacks.visualization.module_maps import plot_contribution_maps
from tests.helpers.records import MakeReport, many_teachers, split
from tests.helpers.updates import update_only, with_module_products, with_texts


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


def test_what_is_undefined_is_no_bar(make_report: MakeReport) -> None:
    analysis = Analysis(update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1)))
    nothing = Estimate(np.nan, np.nan, np.nan, 6, 0, note="teacher equals student")
    analysis.__dict__["depth_contributions"] = [
        replace(part, estimates=(part.estimates[0], nothing)) for part in analysis.depth_contributions
    ]
    summaries = [
        replace(summary, figures={**summary.figures, "update_contribution": nothing})
        if summary.teacher == analysis.report.teachers[1]
        else summary
        for summary in analysis.summaries()
    ]
    analysis.summaries = lambda *_: summaries  # type: ignore[method-assign]
    plot = plot_contributions(analysis)
    assert plot is not None
    assert [bool(axes.containers) for axes in plot.axes] == [True, False]


def test_many_teachers_and_long_responses_fit() -> None:
    report = update_only(with_texts(many_teachers(8), 3000), lambda correct: (0.1,) * 8)
    plot = plot_contributions(Analysis(report))
    assert plot is not None
    assert plot.get_size_inches()[1] < 12
    assert len(plot.axes) == 8


@pytest.fixture
def of_modules(make_report: MakeReport) -> ProbeReport:
    report = update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1))
    return with_module_products(report, {"layers.0.q_proj": 0.7, "layers.0.v_proj": 0.5, "layers.1.q_proj": -0.2})


def test_layers_and_kinds_both_end_at_the_whole(of_modules: ProbeReport) -> None:
    plot = plot_module_contributions(Analysis(of_modules))
    assert plot is not None
    labels = [label.get_text() for label in plot.axes[-1].get_xticklabels()]
    assert labels == ["0", "1", "q_proj", "v_proj", "whole update"]
    for summary, axes in zip(Analysis(of_modules).summaries()[::4], plot.axes, strict=True):
        whole = summary.figures["update_contribution"].value
        bars = [container[0] for container in axes.containers]
        np.testing.assert_allclose([bar.get_height() / whole for bar in bars], [1.2, -0.2, 0.5, 0.5, 1.0])
        np.testing.assert_allclose([bar.get_y() / whole for bar in bars], [0, 1.2, 0, 0.5, 0])


def test_bars_are_pale_unless_the_interval_excludes_0(of_modules: ProbeReport) -> None:
    analysis = Analysis(of_modules)
    plot = plot_module_contributions(analysis)
    assert plot is not None
    assert analysis.module_contributions is not None
    layers = analysis.module_contributions.layers
    for teacher_index, axes in enumerate(plot.axes):
        for part, container in zip(layers, axes.containers, strict=False):
            estimate = part.estimates[teacher_index]
            is_sure = estimate.low > 0 or estimate.high < 0
            assert container[0].get_facecolor()[3] == (1.0 if is_sure else PALE)


def test_of_many_layers_only_some_have_a_label(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, 0.1))
    many = with_module_products(report, {f"layers.{layer}.q_proj": 1 / 80 for layer in range(80)})
    plot = plot_module_contributions(Analysis(many))
    assert plot is not None
    assert len(plot.axes[0].containers) == 82
    assert 5 < len(plot.axes[0].get_xticks()) < 25


def test_the_map_has_each_module_s_contribution(of_modules: ProbeReport) -> None:
    analysis = Analysis(of_modules)
    plot = plot_contribution_maps(analysis)
    assert plot is not None
    whole = analysis.summaries()[0].figures["update_contribution"].value
    cells = plot.axes[0].collections[0].get_array()
    np.testing.assert_allclose(cells.filled(np.nan), np.array([[0.7, -0.2], [0.5, np.nan]]) * whole)


def test_without_products_by_module_there_is_no_picture(make_report: MakeReport) -> None:
    analysis = Analysis(update_only(make_report(split), lambda correct: (0.6, 0.1)))
    assert plot_module_contributions(analysis) is None
    assert plot_contribution_maps(analysis) is None
