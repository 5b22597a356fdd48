"""The scalars that are logged: their names, and that none is missing."""

import math

import pytest

from odp_callbacks.analysis.correlations import correlations
from odp_callbacks.analysis.estimators import success_rate
from odp_callbacks.analysis.predictors import POLICY_PREDICTORS
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.analysis.summaries import INCORRECT_MINUS_CORRECT, summarise
from odp_callbacks.records import ProbeReport
from tests.helpers.records import random_nodes, report_of


def test_scalars_are_named_and_complete():
    report = report_of(random_nodes())
    logged = scalars(report)
    for summary in summarise(report):
        suffix = f"{summary.teacher}/{summary.split}"
        is_difference = summary.split == INCORRECT_MINUS_CORRECT
        for name, figure in summary.figures.items():
            if is_difference and name in POLICY_PREDICTORS:
                continue
            values = [logged[f"odp/{name}{end}/{suffix}"] for end in ("", "_low", "_high")]
            assert values == pytest.approx([figure.value, figure.low, figure.high], nan_ok=True)
        if is_difference:
            continue
        assert logged[f"odp/questions/{suffix}"] == 3
        assert logged[f"odp/nodes/{suffix}"] == summary.nodes
        assert logged[f"odp/undefined_share/{suffix}"] == summary.undefined / summary.nodes
        assert logged[f"odp/undetermined_share/{suffix}"] == summary.undetermined / summary.nodes
    for (teacher, predictor), correlation in correlations(report).items():
        assert logged[f"odp/correlation_{predictor}/{teacher}"] == pytest.approx(correlation.value, nan_ok=True)
        assert logged[f"odp/correlation_{predictor}_low/{teacher}"] == pytest.approx(correlation.low, nan_ok=True)
    assert all(isinstance(value, float) for value in logged.values())


def test_scalars_of_the_probe_as_a_whole():
    report = report_of(random_nodes())
    expected = {
        "success_rate": 0.625,
        "success_rate_low": success_rate(report).low,
        "success_rate_high": 1.0,
        "undefined_share": 2 / 12,
        "undetermined_share": 1 / 12,
        "truncated_share": 4 / 20,
        "nodes": 12,
        "unused_questions": 0,
        "unscored_responses": 0,
        "response_limit": float("nan"),
        "questions_without_time": 0,
        "generated_tokens": 100,
        "seconds": 3.0,
        "seconds_rollouts": 1.0,
        "seconds_gradients": 2.0,
    }
    logged = {name.removeprefix("odp/probe/"): value for name, value in scalars(report).items() if "/probe/" in name}
    assert logged == pytest.approx(expected, nan_ok=True)


def test_differences_are_logged_whatever_the_teachers_are_called():
    """A name that looks like a difference of teachers once lost its predictors and counts of nodes."""
    logged = scalars(report_of(random_nodes(), teachers=("self - 1C", "far")))
    assert logged["odp/nodes/self - 1C/all"] == 12
    assert "odp/forward_kl/self - 1C/all" in logged
    assert "odp/predicted_gain/self - 1C - far/all" in logged
    assert "odp/forward_kl/self - 1C - far/all" not in logged


def test_a_report_without_anything():
    empty = ProbeReport(("near",), (), (), (), {}, 0, 0, {})
    assert math.isnan(success_rate(empty).value)
    logged = scalars(empty)
    assert math.isnan(logged["odp/probe/truncated_share"])
    assert logged["odp/probe/nodes"] == 0
