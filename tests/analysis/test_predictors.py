"""Predictors of nodes and of tokens, from records."""

from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.node_estimates import student_success
from odp_callbacks.analysis.predictors import (
    NODE_PREDICTORS,
    TOKEN_PREDICTORS,
    TOP_K_PREDICTORS,
    node_predictor,
    token_predictors,
)
from odp_callbacks.records import ProbeReport
from tests.helpers.records import MakeReport, random_nodes, report_of
from tests.helpers.updates import with_features, with_texts, with_update


@pytest.fixture
def report(make_report: MakeReport) -> ProbeReport:
    made = with_texts(make_report(lambda correct, depth: (0.5, -0.2), questions=3), 5)
    return with_features(with_update(made, lambda correct: (0.4, -0.1)))


def test_predictors_of_nodes_have_a_column_for_each_teacher(report: ProbeReport) -> None:
    repeated = replace(report.rollouts[1], pieces=("a",) * 7)
    report = replace(report, rollouts=(report.rollouts[0], repeated, *report.rollouts[2:]))
    for name in NODE_PREDICTORS:
        column = node_predictor(report, name)
        assert column.shape == (len(report.nodes), 2)
        assert np.isnan(column).all() == (name in TOP_K_PREDICTORS), "records of before have no top k"
    assert node_predictor(report, "depth")[:, 1].tolist() == [node.depth for node in report.nodes]
    assert node_predictor(report, "success")[:, 0].tolist() == [student_success(node) for node in report.nodes]
    expected = [0.75 if node.rollout == 1 else 0 for node in report.nodes]
    assert node_predictor(report, "repetition")[:, 0].tolist() == pytest.approx(expected)
    assert node_predictor(report_of([]), "js").shape == (0, 2)


def test_a_predictor_that_only_some_nodes_have_is_unknown_at_the_others() -> None:
    first, *others = random_nodes(3)
    with_one = replace(first, predictors={**first.predictors, "top_k_overlap": np.array([0.5, 1.0])})
    column = node_predictor(report_of([with_one, *others]), "top_k_overlap")
    assert column[0].tolist() == [0.5, 1.0]
    assert np.isnan(column[1:]).all()


def test_predictors_of_tokens_stand_where_the_tokens_are(report: ProbeReport) -> None:
    features = report.updates[0].features
    assert features is not None
    shuffled = np.random.default_rng(0).permutation(len(features.depth))
    columns = {name: None if values is None else values[shuffled] for name, values in vars(features).items()}
    columns["top_k_overlap"] = columns["reverse_kl"]
    update = replace(report.updates[0], features=replace(features, **columns))
    found = token_predictors(replace(report, updates=(update,)))
    assert set(found) == set(TOKEN_PREDICTORS)
    np.testing.assert_array_equal(found["reverse_kl"], features.reverse_kl)
    np.testing.assert_array_equal(found["top_k_overlap"], features.reverse_kl)
    np.testing.assert_array_equal(found["student_entropy"][:, 1], features.student_entropy)
    gap = np.abs(features.student_entropy[:, None] - features.teacher_entropy)
    np.testing.assert_array_equal(found["entropy_gap"], gap)
    assert found["depth"][:6, 0].tolist() == [0, 1, 2, 3, 4, 0]
    assert np.isnan(found["overlap_advantage"]).all()
    unmeasured = token_predictors(replace(report, updates=()))
    assert np.isnan(unmeasured["reverse_kl"]).all()
    assert (unmeasured["repetition"] == 0).all()
