"""Pictures of what predicts where a teacher helps, and of success along depth."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from odp_callbacks.analysis.correlations import correlations
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.plot_style import to_svg
from odp_callbacks.visualization.predictor_plots import plot_predictors, plot_success_by_depth
from tests.helpers.records import MakeReport, hostile, many_teachers, report_of
from tests.helpers.updates import with_features, with_update


def texts(plot: Figure) -> list[list[tuple[str, bool]]]:
    """The numbers of each map, and whether they are bold."""
    maps = [axes for axes in plot.axes if axes.texts]
    return [[(text.get_text(), text.get_fontweight() == "bold") for text in axes.texts] for axes in maps]


@pytest.fixture
def report(make_report: MakeReport) -> ProbeReport:
    made = make_report(lambda correct, depth: (0.5 - 0.1 * depth, -0.2), questions=8, noise=0.3)
    return with_features(with_update(made, lambda correct: (0.4, -0.1), noise=0.5))


def test_every_correlation_is_a_number_that_is_bold_if_it_excludes_zero(report: ProbeReport) -> None:
    plot = plot_predictors(Analysis(report, 0.8))
    assert plot is not None
    assert [axes.get_title() for axes in plot.axes][:3] == ["alignment", "predicted gain", "influence"]
    for target, drawn in zip(("alignment", "predicted_gain", "influence"), texts(plot), strict=True):
        found = [e for e in correlations(report, 0.8, target).values() if np.isfinite(e.value)]
        expected = sorted((f"{e.value:+.2f}".replace("0.", "."), e.low > 0 or e.high < 0) for e in found)
        assert sorted(drawn) == expected
    assert "depth" in [label.get_text() for label in plot.axes[0].get_yticklabels()]


def test_many_teachers_get_dots_in_place_of_numbers() -> None:
    plot = plot_predictors(Analysis(many_teachers(8)))
    assert plot is not None
    assert {text for drawn in texts(plot) for text, _ in drawn} <= {"", "•"}


def test_without_a_correlation_there_is_no_picture(report: ProbeReport) -> None:
    assert plot_predictors(Analysis(report_of([]))) is None
    assert plot_success_by_depth(Analysis(report_of([]))) is None
    only_influence = replace(report, nodes=())
    plot = plot_predictors(Analysis(only_influence))
    assert plot is not None
    assert len(texts(plot)) == 1
    assert plot_success_by_depth(Analysis(only_influence)) is None


def test_success_has_a_point_for_each_class_and_window(report: ProbeReport) -> None:
    plot = plot_success_by_depth(Analysis(report))
    assert plot is not None
    (axes,) = plot.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2-3", "4-7"]
    heights = [float(container[0].get_ydata()[0]) for container in axes.containers]
    assert heights == pytest.approx([0.5] * 6)


def test_hostile_names_are_drawn(make_report: MakeReport) -> None:
    plot = plot_predictors(Analysis(hostile(make_report)))
    assert plot is not None
    assert "<script>" not in to_svg(plot)
