"""What a notebook shows of a report, and plots on axes of the caller's."""

import sys
from dataclasses import replace

import matplotlib.pyplot
import numpy as np
import pytest

from odp_callbacks.records import ProbeReport
from tests.helpers.records import MakeReport, split
from tests.helpers.updates import update_only


def test_a_notebook_shows_the_advice_the_picture_and_the_table(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, 0.1))
    shown = report._repr_html_()
    assert shown.index("<strong>") < shown.index("<svg") < shown.index("Does the teacher push towards success?")
    assert "<script" not in shown


def test_texts_of_a_report_are_escaped(make_report: MakeReport) -> None:
    report = replace(update_only(make_report(split), lambda correct: (0.6, 0.1)), teachers=("<b>bold</b>", "other"))
    assert "<b>bold</b>" not in report._repr_html_()


def test_an_empty_report_is_shown_too() -> None:
    shown = ProbeReport(("base",), (), (), (), {}, 0, 0, {})._repr_html_()
    assert "Nothing was measured" in shown
    assert "<svg" not in shown


@pytest.mark.parametrize("kind", ["gain", "depth", "divergence"])
def test_a_plot_is_drawn_on_axes_of_the_caller(make_report: MakeReport, kind: str) -> None:
    report = make_report(split)
    plot, (left, right) = matplotlib.pyplot.subplots(1, 2)
    figure, axes = report.plot(kind, ax=right)
    assert figure is plot
    assert axes is right
    assert right.lines
    assert not left.lines
    assert right.get_legend() is not None, "a legend of the whole plot would hide other axes'"
    assert not plot.legends
    matplotlib.pyplot.close(plot)


def test_without_axes_there_is_a_new_plot_that_a_notebook_shows(make_report: MakeReport) -> None:
    before = set(matplotlib.pyplot.get_fignums())
    figure, axes = make_report(split).plot()
    assert axes in figure.axes
    assert set(matplotlib.pyplot.get_fignums()) - before == {figure.number}
    matplotlib.pyplot.close(figure)


def test_the_interval_has_the_level_that_is_asked_for(make_report: MakeReport) -> None:
    report, widths = make_report(split), []
    for confidence in (0.8, 0.95):
        figure, axes = report.plot(confidence=confidence)
        (bars,) = axes.containers[0][2]
        widths.append(np.ptp(bars.get_segments()[0][:, 0]))
        matplotlib.pyplot.close(figure)
    assert widths[0] < widths[1]


def test_a_plot_that_does_not_exist_is_refused(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, 0.1))
    with pytest.raises(ValueError, match="`kind` must be one of"):
        report.plot("gains")
    with pytest.raises(ValueError, match="`kind` is 'depth', which shows single tokens"):
        report.plot("depth")


def test_a_report_is_named_in_one_line(make_report: MakeReport) -> None:
    assert repr(make_report(split)) == "<ProbeReport of 6 questions, 12 rollouts, 36 nodes; teachers: near, far>"


def test_without_matplotlib_the_error_names_the_extra(make_report: MakeReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"`plot` needs matplotlib.*odp-callbacks\[report\]"):
        make_report(split).plot()
