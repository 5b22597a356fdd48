"""The curve of a run from the records of its probes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.estimators import success_rate
from odp_callbacks.analysis.run_curve import RUN_CURVE, curve_setting, run_curve
from odp_callbacks.records import ProbeReport
from tests.helpers.records import report_maker, split


def probe(step: int, points: list[dict[str, float]], correct: int = 6) -> ProbeReport:
    """A probe of six questions with two rollouts each, of which so many are correct."""
    report = report_maker()(split)
    rollouts = tuple(replace(one, reward=float(index < correct)) for index, one in enumerate(report.rollouts))
    setting = json.loads(json.dumps(curve_setting(step, points)))  # as a record keeps it
    return replace(report, rollouts=rollouts, settings={RUN_CURVE: setting})


def point(step: int, gain_sum: float) -> dict[str, float]:
    return {"step": step, "gain_sum": gain_sum, "gain_sum_low": gain_sum - 1, "reward_change": 2 * gain_sum}


def test_the_parts_of_all_probes_make_one_curve() -> None:
    curve = run_curve([probe(0, []), probe(3, [point(1, 0.1), point(2, 0.2)]), probe(5, [point(4, 0.3)])])
    assert curve is not None
    np.testing.assert_array_equal(curve.steps, [1, 2, 4])
    np.testing.assert_array_equal(curve.gain_sum, [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(curve.reward_change, [0.2, 0.4, 0.6])
    np.testing.assert_allclose(curve.low, [-0.9, -0.8, -0.7])
    assert np.isnan(curve.high).all(), "what was not measured is not 0"
    np.testing.assert_array_equal(curve.probe_steps, [0, 3, 5])


def test_success_is_the_change_since_the_first_probe() -> None:
    first, later = probe(0, [], correct=3), probe(4, [], correct=9)
    curve = run_curve([first, later])
    assert curve is not None
    start, change = curve.success_change
    assert (start.value, np.isnan(start.low)) == (0, True)
    rates = success_rate(first), success_rate(later)
    assert change.value == pytest.approx(0.5)
    assert change.half_width == pytest.approx(np.hypot(rates[0].half_width, rates[1].half_width))


def test_without_a_run_there_is_no_curve() -> None:
    assert run_curve([]) is None
    assert run_curve([replace(probe(0, []), settings={})] * 2) is None
    assert run_curve([probe(0, [])]) is None, "a single probe shows no change"
    assert run_curve([probe(2, [point(1, 0.1)])]) is not None
