"""The plot of what a run was expected to gain, beside what was realised."""

from dataclasses import replace

import numpy as np

from odp_callbacks.analysis.run_curve import RUN_CURVE, curve_setting
from odp_callbacks.visualization.run_plots import plot_realised
from tests.helpers.records import MakeReport, split


def test_expected_reward_and_success_are_drawn_at_their_steps(make_report: MakeReport) -> None:
    points = [
        {"step": step, "gain_sum": 0.1 * step, "gain_sum_low": 0.0, "gain_sum_high": 1.0, "reward_change": 0.3}
        for step in (1, 2)
    ]
    reports = [
        replace(make_report(split), settings={RUN_CURVE: curve_setting(step, of_step)})
        for step, of_step in ((0, []), (3, points))
    ]
    plot = plot_realised(reports)
    assert plot is not None
    (axes,) = plot.axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    expected, reward = lines["expected: sum of step gains"], lines["reward of a batch"]
    np.testing.assert_allclose(np.asarray(expected.get_xydata()), [[1, 0.1], [2, 0.2]])
    np.testing.assert_allclose(np.asarray(reward.get_xydata()), [[1, 0.3], [2, 0.3]])
    (success,) = axes.containers
    np.testing.assert_allclose(np.asarray(success[0].get_xydata()), [[0, 0], [3, 0]], atol=1e-12)


def test_without_followed_steps_the_probes_alone_are_drawn(make_report: MakeReport) -> None:
    reports = [replace(make_report(split), settings={RUN_CURVE: curve_setting(step, [])}) for step in (0, 3)]
    plot = plot_realised(reports)
    assert plot is not None
    assert not any("expected" in str(line.get_label()) for line in plot.axes[0].get_lines())


def test_records_of_no_run_have_no_plot(make_report: MakeReport) -> None:
    assert plot_realised([make_report(split)] * 2) is None
