"""Figures of rules against the explicit gradients behind them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.analysis.jackknife import jackknife
from odp_callbacks.analysis.rule_figures import (
    RULE,
    WeightedInfluence,
    contribution_share,
    influence_contribution,
    measured_rule,
    rule_gram,
)
from odp_callbacks.analysis.token_influence import influence_intervals
from odp_callbacks.analysis.update_gain import update_contribution, update_gain
from odp_callbacks.update_records import RuleProducts, TokenInfluence, UpdateGram, UpdateRecord, gram_of_rows

SIZE, TOKENS = 6, 4
"""LoRA parameters, and tokens of each class in a group."""


def draw(groups: int, seed: int) -> tuple[UpdateGram, np.ndarray, np.ndarray]:
    """Products of success gradients and of the tokens' gradients ``(F, K, C, T, P)``, which are returned too."""
    rng = np.random.default_rng(seed)
    success, tokens = rng.normal(size=(groups, SIZE)), rng.normal(size=(groups, 2, 2, TOKENS, SIZE))
    counts = np.full((groups, 2), float(TOKENS))
    return gram_of_rows(np.ones(groups), counts, success, tokens.sum(axis=3)), success, tokens


def products_of(success: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> RuleProducts:
    """Products of one rule with the weights ``(F, K, C, T)``."""
    rows = np.einsum("fkctp,fkct->fkp", tokens, weights)
    whole = tokens.sum(axis=(2, 3))
    return RuleProducts(
        ("rule",),
        weights.sum(axis=(0, 2, 3))[None],
        (weights > 0).sum(axis=(2, 3)).astype(float)[None],
        np.einsum("fp,hkp->fhk", success, rows)[None],
        np.einsum("fkp,hkp->fhk", rows, rows)[None],
        np.einsum("fkp,hkp->fhk", rows, whole)[None],
    )


@given(st.integers(2, 7), st.integers(0, 300))
def test_the_two_classes_are_the_rule_and_what_it_leaves_out(groups: int, seed: int) -> None:
    gram, success, tokens = draw(groups, seed)
    weights = np.random.default_rng(seed + 1).random((groups, 2, 2, TOKENS))
    found = rule_gram(gram, products_of(success, tokens, weights), 0)
    rule = np.einsum("fkctp,fkct->fkp", tokens, weights)
    rest = tokens.sum(axis=(2, 3)) - rule
    expected = gram_of_rows(np.ones(groups), found.tokens, success, np.stack([rule, rest], axis=2))
    for name in ("success", "cross", "directions", "between"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-9)


@given(st.integers(3, 7), st.integers(0, 300))
def test_weights_of_1_have_the_gain_of_everything(groups: int, seed: int) -> None:
    gram, success, tokens = draw(groups, seed)
    ones = rule_gram(gram, products_of(success, tokens, np.ones((groups, 2, 2, TOKENS))), 0)
    everything = jackknife(update_gain([gram], 1))
    found = jackknife(update_gain([ones], 1, RULE))
    assert (found.value, found.low, found.high) == pytest.approx((everything.value, everything.low, everything.high))


@given(st.integers(2, 7), st.integers(0, 300))
def test_contributions_of_a_partition_add_up(groups: int, seed: int) -> None:
    gram, success, tokens = draw(groups, seed)
    weights = np.random.default_rng(seed + 1).random((groups, 2, 2, TOKENS))
    ones = np.ones(groups)
    parts = [
        update_contribution([rule_gram(gram, products_of(success, tokens, part), 0)], 0, RULE).statistic(ones)
        for part in (weights, 1 - weights)
    ]
    assert sum(parts) == pytest.approx(update_contribution([gram], 0, (1, 1)).statistic(ones), abs=1e-9)


def influences(questions: int, seed: int = 0, *, folds: int = 4, noise: float = 1.0) -> tuple[TokenInfluence, float]:
    """Influences of three tokens of each question, and what the update truly gains, given the norm of its direction."""
    rng = np.random.default_rng(seed)
    mean, direction = np.eye(2, 30) * np.array([[0.5], [1.0]])
    direction = direction + 0.6 * mean
    success = mean + noise * rng.normal(size=(questions, 30))
    tokens = direction + rng.normal(size=(questions, 3, 30)) * rng.choice([0.3, 1.0, 3.0], size=(questions, 3, 1))
    fold = np.arange(questions) * folds // questions
    means = np.stack([success[fold == one].mean(axis=0) for one in range(folds)])
    by_fold = np.einsum("sp,qtp->sqt", means, tokens)
    by_fold[fold, np.arange(questions)] = np.nan
    norm = float(np.linalg.norm(tokens.sum(axis=(0, 1))))
    measured = TokenInfluence(
        np.repeat(np.arange(questions), 3),
        np.tile(np.arange(3), questions),
        by_fold.reshape(folds, -1, 1).astype(np.float32),
        np.bincount(fold, minlength=folds).astype(float),
        np.array([norm]),
        np.ones((3 * questions, 1), np.float32),
    )
    return measured, float(3 * questions * mean @ direction / norm)


@given(st.integers(4, 12), st.integers(0, 300))
def test_a_contribution_is_the_weighted_sum_of_influences(questions: int, seed: int) -> None:
    measured, _ = influences(questions, seed)
    weights = np.random.default_rng(seed).random(3 * questions)
    found = influence_contribution([WeightedInfluence(measured, weights)], 0).statistic(np.ones(4))
    assert found == pytest.approx(float(weights @ influence_intervals(measured).value[:, 0]), abs=1e-9)
    parts = [
        influence_contribution([WeightedInfluence(measured, part)], 0).statistic(np.ones(4))
        for part in (weights, 1 - weights, np.ones(3 * questions))
    ]
    assert parts[0] + parts[1] == pytest.approx(parts[2], abs=1e-9)


def test_several_measurements_count_by_their_questions() -> None:
    first, second = influences(8, 1)[0], influences(16, 2)[0]
    weighted = [WeightedInfluence(one, np.ones(len(one.depth))) for one in (first, second)]
    apart = [influence_contribution([one], 0).statistic(np.ones(4)) for one in weighted]
    together = influence_contribution(weighted, 0).statistic(np.ones(8))
    assert together == pytest.approx((8 * apart[0] + 16 * apart[1]) / 24)


@pytest.mark.parametrize(("questions", "noise"), [(8, 1.0), (16, 3.0), (32, 0.3)])
def test_intervals_of_contributions_cover_the_truth(questions: int, noise: float) -> None:
    covered = 0
    for seed in range(400):
        measured, truth = influences(questions, seed, noise=noise)
        estimate = jackknife(influence_contribution([WeightedInfluence(measured, np.ones(3 * questions))], 0))
        covered += estimate.low <= truth <= estimate.high
    # 95 % of 400 less three standard errors; a little above is no fault.
    assert covered >= 400 * 0.95 - 3 * (400 * 0.95 * 0.05) ** 0.5


def test_a_share_is_the_ratio_of_contributions() -> None:
    measured, _ = influences(8)
    weights = np.arange(24) / 23
    part, whole = (
        influence_contribution([WeightedInfluence(measured, values)], 0) for values in (weights, np.ones(24))
    )
    share = contribution_share(part, whole)
    assert share.statistic(np.ones(4)) == pytest.approx(part.statistic(np.ones(4)) / whole.statistic(np.ones(4)))
    assert np.isnan(jackknife(contribution_share(part, whole, "undecided")).value)


def test_a_rule_counts_as_measured_only_with_the_same_weights() -> None:
    gram, success, tokens = draw(4, 0)
    weights = np.random.default_rng(1).random((4, 2, 2, TOKENS))
    record = UpdateRecord(gram, None, None, products_of(success, tokens, weights))
    sums = weights.sum(axis=(0, 2, 3))
    assert len(measured_rule([record], "rule", [sums])) == 1
    assert measured_rule([record], "rule", [1.01 * sums]) == []
    assert measured_rule([record], "other", [sums]) == []
    assert measured_rule([record, UpdateRecord(gram)], "rule", [sums, sums]) == []
