"""Directions of rules against one plain backward per token."""

from typing import Any

import numpy as np
import pytest
import torch

from odp_callbacks import ProbeReport, diagnose
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.measurement import UpdateMeter
from odp_callbacks.functional.tokens import Tokens, policy_features
from odp_callbacks.functional.top_k import top_k_predictors
from odp_callbacks.functional.updates import leave_one_out_advantages
from odp_callbacks.gates import RULES, score_rules
from odp_callbacks.update_records import TokenFeatures, UpdateRecord
from tests.engine.update.test_gradient_rows import TEMPERATURE, make_gradients, token_gradients
from tests.engine.update.test_gradient_rows import make_rollouts as rollouts_of_two_questions
from tests.engine.update.test_measurement import REWARDS, ROWS, TEACHERS, make_rollouts, starts_right
from tests.helpers.models import tiny, word_tokenizer

QUESTION = torch.arange(10) // 2


def with_features(student: Any) -> UpdateGradients:
    made = make_gradients(student)
    return UpdateGradients(student, made.tokenizer, made.teachers, made.direction, TEMPERATURE, features=True)


def early(tokens: Tokens) -> torch.Tensor:
    return 1 / (1.0 + tokens.depth)


def late(tokens: Tokens) -> torch.Tensor:
    return 1 - early(tokens)


def confident(tokens: Tokens) -> torch.Tensor:
    return torch.exp(-tokens.need("teacher_entropy"))


@pytest.mark.parametrize("apart", [False, True])
def test_weighted_rows_equal_weighted_sums_of_backward_passes(apart: bool) -> None:
    student = tiny()
    gradients, rollouts = with_features(student), rollouts_of_two_questions()
    expected = [rows[:, 1:] for rows in token_gradients(student, gradients)]  # (T, K, P) for each rollout
    if apart:
        gradients.no_segments = "as if a parameter were no weight of a linear layer"
    _, directions = gradients.segment_rows(rollouts, [0.5, -0.5, 0.25], [0, 0, 1])
    weights = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gradients.weighted_rows(rollouts, directions, weights, [0, 0, 1]).double()
    of_rollouts = weights.split([4, 1, 2], dim=1)
    sums = [torch.einsum("tkp,kt->kp", r.double(), w) for r, w in zip(expected, of_rollouts, strict=True)]
    torch.testing.assert_close(found, torch.stack([sums[0] + sums[1], sums[2]]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("apart", [False, True])
def test_features_are_those_of_both_policies(apart: bool) -> None:
    student = tiny()
    gradients = with_features(student)
    if apart:
        gradients.no_segments = "as if a parameter were no weight of a linear layer"
    (rollout, *_) = rollouts = rollouts_of_two_questions()
    _, directions = gradients.segment_rows(rollouts, [0.0] * 3, [0, 0, 1])
    assert directions.features is not None
    sequence = rollout.sequence[None]
    with torch.no_grad():
        own = student(input_ids=sequence).logits[0, rollout.positions(range(4))]
        with student.disable_adapter():
            base = student(input_ids=sequence).logits[0, rollout.positions(range(4))]
    of_rules = policy_features(own, base, torch.tensor(rollout.response_ids), TEMPERATURE)
    expected = torch.stack([*of_rules.values(), *top_k_predictors(own, base, TEMPERATURE).values()])
    torch.testing.assert_close(directions.features[:, 1, :4], expected.float(), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def record() -> UpdateRecord:
    by_class = {"even": lambda tokens: tokens.counts, "correct": lambda tokens: tokens.need("correct").float() / 2}
    rules = {"early": early, "late": late, "confident": confident, **by_class}
    return UpdateMeter(with_features(tiny())).measure(make_rollouts(), rules=rules).record


def test_products_are_those_of_explicit_gradients(record: UpdateRecord) -> None:
    gradients, rollouts = with_features(tiny()), make_rollouts()
    advantages = leave_one_out_advantages(torch.tensor(REWARDS, dtype=torch.float64), QUESTION) / 2
    rows = []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        (of_all,), directions = gradients.segment_rows([rollout], [float(advantage)], [0])
        depth = torch.arange(len(rollout.response_ids))
        (weighted,) = gradients.weighted_rows([rollout], directions, (1 / (1.0 + depth)).expand(2, -1), [0])
        rows.append(torch.cat([of_all, weighted]).double())
    by_question = torch.stack([torch.stack(rows[2 * i : 2 * i + 2]).sum(0) for i in range(5)])
    success, whole, rule = by_question[:, 0], by_question[:, 1:3], by_question[:, 3:]
    assert record.rules is not None
    index = record.rules.names.index("early")
    for found, expected in (
        (record.rules.cross, torch.einsum("fp,hkp->fhk", success, rule)),
        (record.rules.own, torch.einsum("fkp,hkp->fhk", rule, rule)),
        (record.rules.whole, torch.einsum("fkp,hkp->fhk", rule, whole)),
    ):
        np.testing.assert_allclose(found[index], expected.numpy(), rtol=1e-4, atol=1e-9)


def test_rules_by_correctness_alone_are_not_measured_again(record: UpdateRecord) -> None:
    assert record.rules is not None
    assert record.rules.names == ("early", "late", "confident")
    lengths = sum(len(rollout.response_ids) for rollout in make_rollouts())
    assert record.rules.weight[:2].sum(axis=0) == pytest.approx(lengths)
    assert record.rules.tokens[0].sum(axis=0) == pytest.approx(lengths)
    assert record.rules.tokens[1].sum(axis=0) == pytest.approx(lengths - 10)  # the first tokens have no weight


def test_products_of_a_partition_add_up(record: UpdateRecord) -> None:
    assert record.rules is not None
    early_products, late_products = record.rules.cross[:2]
    np.testing.assert_allclose(early_products + late_products, record.gram.cross.sum(axis=3), rtol=1e-4, atol=1e-8)


def test_features_lie_where_their_tokens_are(record: UpdateRecord) -> None:
    features = record.features
    assert isinstance(features, TokenFeatures)
    rollouts = make_rollouts()
    assert features.rollout.tolist() == [i for i, r in enumerate(rollouts) for _ in r.response_ids]
    alone = UpdateMeter(with_features(tiny())).measure(rollouts[6:8]).record.features
    assert alone is not None
    chosen = (features.rollout == 6) | (features.rollout == 7)
    np.testing.assert_allclose(features.reverse_kl[chosen], alone.reverse_kl, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    return diagnose(
        tiny().float(), word_tokenizer(), ROWS, starts_right, TEACHERS,
        budget=0, rollouts_per_question=16, max_new_tokens=4, rules=RULES,
    )  # fmt: skip


def test_a_diagnosis_scores_every_rule_with_an_interval(report: ProbeReport, tmp_path: Any) -> None:
    scores = score_rules(report)
    assert len(scores) == 2 * len(RULES)
    for score in scores:
        assert score.update_gain.low < score.update_gain.value < score.update_gain.high
        assert np.isfinite(score.contribution.value)
        assert np.isnan(score.predicted_gain.value)
        assert score.predicted_gain.note == "no continuations"
    loaded = ProbeReport.load(report.save(tmp_path / "probe"))
    assert [score.update_gain for score in score_rules(loaded)] == [score.update_gain for score in scores]


def test_the_settings_name_the_rules(report: ProbeReport) -> None:
    assert report.settings["rules"] == tuple(RULES)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rules": [early]}, "`rules` must map names to functions"),
        ({"rules": {"early": early}, "update": False, "budget": None}, "`rules` is given, but `update` is False"),
        ({"rules": {"negative": lambda t: early(t) - 1}}, "`rules` has 'negative', .* finite and not negative"),
        ({"rules": {"short": lambda t: early(t)[1:]}}, "`rules` has 'short', .* one weight for each"),
    ],
)
def test_impossible_rules_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        diagnose(
            tiny().float(),
            word_tokenizer(),
            ROWS,
            starts_right,
            TEACHERS,
            **{"budget": 0, "max_new_tokens": 3, **options},
        )
