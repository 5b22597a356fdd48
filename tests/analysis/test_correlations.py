"""Rank correlations of alignment, gain and influence with their predictors."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.correlations import TARGETS, correlations, measured_targets
from odp_callbacks.analysis.node_estimates import estimate, student_success
from odp_callbacks.analysis.predictors import NODE_PREDICTORS, PREDICTORS, TOP_K_PREDICTORS
from odp_callbacks.records import NodeRecord, ProbeReport
from tests.helpers.records import MakeReport, has_equal_successes, random_nodes, report_of
from tests.helpers.updates import with_features, with_update

KNOWN = tuple(name for name in NODE_PREDICTORS if name not in (*TOP_K_PREDICTORS, "repetition"))
"""Predictors of nodes whose records have no top k, in responses of one token."""


def values_of(node: NodeRecord, name: str, teacher: int) -> float:
    if name == "depth":
        return node.depth
    if name == "success":
        return student_success(node)
    if name == "entropy_gap":
        return abs(float((node.predictors["teacher_entropy"] - node.predictors["student_entropy"])[teacher]))
    return float(node.predictors[name][teacher])


def spearman(nodes: list[NodeRecord], teacher: int, name: str, figure: str) -> float:
    """Spearman's correlation where each node stands as often as its inverse inclusion probability says."""
    counts = [round(1 / node.inclusion) for node in nodes]
    target = [getattr(estimate(node), figure)[teacher] for node in nodes]
    predictor = [values_of(node, name, teacher) for node in nodes]
    return float(stats.spearmanr(np.repeat(predictor, counts), np.repeat(target, counts)).statistic)


def jackknife_by_hand(statistic: Callable[[list[str]], float], questions: list[str]) -> tuple[float, float, float]:
    value = statistic(questions)
    left_out = [statistic([other for other in questions if other != question]) for question in questions]
    count = len(questions)
    square = (count - 1) / count * sum((one - np.mean(left_out)) ** 2 for one in left_out)
    half_width = stats.t.ppf(0.975, count - 1) * math.sqrt(square)
    return value, max(-1, value - half_width), min(1, value + half_width)


@pytest.mark.parametrize("target", TARGETS[:2])
def test_those_of_nodes_are_spearmans_with_the_jackknife_over_questions(target: str) -> None:
    nodes = [replace(node, depth=2 * (index % 7)) for index, node in enumerate(random_nodes(24))]
    report = report_of(nodes)
    chosen = nodes if target == "predicted_gain" else [node for node in nodes if not has_equal_successes(node)]
    estimates = correlations(report, target=target)
    assert set(estimates) == {(teacher, name) for teacher in report.teachers for name in KNOWN}
    for teacher_index, teacher in enumerate(report.teachers):
        for name in KNOWN:

            def of_questions(kept: list[str], index: int = teacher_index, name: str = name) -> float:
                return spearman([node for node in chosen if node.question in kept], index, name, target)

            expected = jackknife_by_hand(of_questions, ["0", "1", "2"])
            found = estimates[teacher, name]
            assert (found.value, found.low, found.high) == pytest.approx(expected)
            assert (found.questions, found.nodes) == (3, len(chosen))


def test_a_node_counts_for_those_without_gradients() -> None:
    nodes = random_nodes(80)
    blank = np.full_like(nodes[0].gram, np.nan)
    kept = [node for index, node in enumerate(nodes) if has_equal_successes(node) or index % 2]
    thinned = [
        node
        if has_equal_successes(node)
        else replace(node, gradient_inclusion=0.5, gram=node.gram if index % 2 else blank)
        for index, node in enumerate(nodes)
    ]
    twice = [node if has_equal_successes(node) else replace(node, inclusion=node.inclusion / 2) for node in kept]
    for target in TARGETS[:2]:
        found, expected = correlations(report_of(thinned), target=target), correlations(report_of(twice), target=target)
        assert found["near", "js"].value == pytest.approx(expected["near", "js"].value)


def test_correlations_that_do_not_exist() -> None:
    too_few = correlations(report_of(random_nodes(2)))
    assert all(math.isnan(correlation.value) for correlation in too_few.values())
    constant_predictors = {predictor: np.ones(2) for predictor in PREDICTORS}
    constant = [replace(node, predictors=constant_predictors) for node in random_nodes()]
    found = correlations(report_of(constant))
    assert all(math.isnan(estimate.value) for (_, name), estimate in found.items() if name != "success")
    assert found["near", "js"].note == "few tokens", "9 of these 12 nodes have an alignment"
    of_gain = correlations(report_of(constant), target="predicted_gain")
    assert of_gain["near", "js"].note == "no difference"
    assert of_gain["near", "success"].note == "few tokens", "9 of these 12 gain something"
    assert np.isfinite(correlations(report_of(random_nodes(16)), target="predicted_gain")["near", "js"].value)
    assert correlations(report_of([]), target="influence") == {}
    with pytest.raises(ValueError, match="`target` must be one of"):
        correlations(report_of([]), target="success")
    with pytest.raises(ValueError, match="`confidence`"):
        correlations(report_of([]), 1.5)


@pytest.fixture
def report(make_report: MakeReport) -> ProbeReport:
    made = make_report(lambda correct, depth: (0.5, -0.2), questions=8)
    return with_features(with_update(made, lambda correct: (0.4, -0.1), noise=0.5))


def influence_by_hand(report: ProbeReport, teacher: int, name: str, folds: list[int]) -> float:
    """The correlation over the tokens of some folds, with influences along the gradients of the other ones of these."""
    influence, features = report.updates[0].influence, report.updates[0].features
    assert influence is not None
    assert features is not None
    products, own = influence.by_fold[:, :, teacher], np.isnan(influence.by_fold[:, :, teacher]).argmax(axis=0)
    column: Any = influence.depth if name == "depth" else getattr(features, name)[:, teacher]
    pairs = [
        (np.average(products[others, token], weights=influence.fold_questions[others]), column[token])
        for token in range(len(own))
        if own[token] in folds and (others := [fold for fold in folds if fold != own[token]])
    ]
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


@pytest.mark.parametrize("name", ["depth", "reverse_kl"])
def test_those_of_tokens_leave_a_fold_out_of_tokens_and_gradients(report: ProbeReport, name: str) -> None:
    estimates = correlations(report, target="influence")
    for index, teacher in enumerate(report.teachers):
        value = influence_by_hand(report, index, name, [0, 1, 2, 3])
        left_out = [influence_by_hand(report, index, name, [f for f in range(4) if f != one]) for one in range(4)]
        half_width = stats.t.ppf(0.975, 3) * math.sqrt(3 / 4 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
        found = estimates[teacher, name]
        assert found.value == pytest.approx(value)
        assert (found.low, found.high) == pytest.approx((max(-1, value - half_width), min(1, value + half_width)))
        assert (found.questions, found.nodes) == (8, sum(len(rollout.pieces) for rollout in report.rollouts))


def test_targets_are_those_that_were_measured(report: ProbeReport) -> None:
    assert measured_targets(report) == TARGETS
    assert measured_targets(replace(report, nodes=())) == ("influence",)
    assert measured_targets(replace(report, updates=())) == TARGETS[:2]
    without_features = replace(report, updates=tuple(replace(one, features=None) for one in report.updates))
    assert {name for _, name in correlations(without_features, target="influence")} == {"depth", "repetition"}
    assert correlations(without_features, target="influence")["near", "repetition"].note == "no difference"
