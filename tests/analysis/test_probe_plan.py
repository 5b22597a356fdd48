from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.probe_plan import plan_probe, unit_prices
from odp_callbacks.engine import ProbeConfig
from odp_callbacks.engine.tree.nodes import BalancedNodes
from odp_callbacks.records import RolloutRecord
from tests.helpers.records import report_of, synthetic


@pytest.fixture
def report():
    generator = np.random.default_rng(0)
    nodes = [
        synthetic(
            generator.random(3).round(1),
            seed=place,
            question=str(place // 8),
            rollout=place // 4,
            depth=place % 4,
        ).record
        for place in range(96)
    ]
    stages = {"rollouts": 12.0, "teachers": 12.0, "gradients": 48.0, "continuations": 24.0}
    rollouts = tuple(RolloutRecord(str(place // 2), "p", ("t",), "t", 1.0, True, False) for place in range(24))
    return replace(report_of(nodes), rollouts=rollouts, stage_seconds=stages, continuations=96 * 3 * 4)


def test_prices_are_seconds_over_numbers(report):
    prices = unit_prices(report)
    assert prices.rollout == pytest.approx(24.0 / len(report.rollouts))
    assert prices.node == pytest.approx(48.0 / 96)
    assert prices.continuation == pytest.approx(24.0 / (96 * 4))  # 4 of every branch, at 96 nodes


def test_a_plan_fits_its_time_and_more_time_narrows_the_interval(report):
    plans = [plan_probe(report, seconds, 1000) for seconds in (60.0, 240.0, 960.0)]
    assert all(plan.seconds <= seconds for plan, seconds in zip(plans, (60.0, 240.0, 960.0), strict=True))
    widths = [plan.half_width for plan in plans]
    assert widths == sorted(widths, reverse=True)
    # With questions to spare, four times the time halves the interval.
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.1)
    assert str(plans[0]).startswith("In ")


def test_the_plan_of_the_realised_numbers_has_the_realised_interval(report):
    numbers = {"questions": 12, "rollouts": 2, "nodes": 4, "continuations": 4}
    plan = plan_probe(report, 96.0, 12, numbers)
    assert plan.seconds == pytest.approx(96.0)
    summaries = [summary for summary in report.summary() if summary.split == "all"]
    widest = max(summary.figures["predicted_gain"].half_width for summary in summaries)
    assert plan.half_width == pytest.approx(widest)


def test_what_cannot_be_planned_is_refused(report):
    with pytest.raises(ValueError, match="`seconds` must be a positive number, but 0 was given"):
        plan_probe(report, 0, 10)
    with pytest.raises(ValueError, match="`report` is too small for a plan"):
        plan_probe(replace(report, nodes=()), 60, 10)


def test_a_plan_is_the_options_of_a_probe(report):
    report = replace(report, generated_tokens={"rollouts": 24, "continuations": 10 * report.continuations})
    plan = plan_probe(report, 96.0, 12, {"questions": 12, "rollouts": 2, "nodes": 4, "continuations": 4})
    branches = sum(len(node.tokens) for node in report.nodes) / len(report.nodes)
    assert plan.budget == pytest.approx(12 * 2 * 4 * 4 * branches * 10, abs=1)
    config = ProbeConfig(**plan.options())
    assert config.rollouts_per_question == 2
    assert config.budget == plan.budget
    assert config.selector == BalancedNodes(4)
