"""Correlations of the alignment with its predictors."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.correlations import correlations
from odp_callbacks.analysis.node_estimates import estimate
from odp_callbacks.analysis.summaries import PREDICTORS
from tests.helpers.records import has_equal_successes, random_nodes, report_of


def pearson(nodes, teacher_index, predictor):
    alignment = [estimate(node).alignment[teacher_index] for node in nodes]
    return stats.pearsonr(alignment, [node.predictors[predictor][teacher_index] for node in nodes]).statistic


def test_correlations_are_pearsons_with_the_jackknife_over_questions():
    nodes = random_nodes(20)
    defined = [node for node in nodes if not has_equal_successes(node)]
    estimates = correlations(report_of(nodes))
    assert set(estimates) == {(teacher, predictor) for teacher in ("near", "far") for predictor in PREDICTORS}
    for teacher_index, teacher in enumerate(("near", "far")):
        for predictor in PREDICTORS:
            expected = pearson(defined, teacher_index, predictor)
            correlation = estimates[teacher, predictor]
            assert correlation.value == pytest.approx(expected, rel=1e-10)
            leave_one_out = [
                pearson([node for node in defined if node.question != question], teacher_index, predictor)
                for question in "012"
            ]
            squared_deviations = sum((value - np.mean(leave_one_out)) ** 2 for value in leave_one_out)
            half_width = stats.t.ppf(0.975, 2) * math.sqrt(2 / 3 * squared_deviations)
            assert correlation.low == pytest.approx(max(-1, expected - half_width))
            assert correlation.high == pytest.approx(min(1, expected + half_width))


def test_correlations_that_do_not_exist():
    too_few = correlations(report_of(random_nodes(2)))
    assert all(math.isnan(correlation.value) for correlation in too_few.values())
    constant_predictors = {predictor: np.ones(2) for predictor in PREDICTORS}
    constant = [replace(node, predictors=constant_predictors) for node in random_nodes()]
    assert all(math.isnan(correlation.value) for correlation in correlations(report_of(constant)).values())
