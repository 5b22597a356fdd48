"""Published rules: the weights that they give."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from odp_callbacks.gates import Tokens, tokens_of
from odp_callbacks.gates.loss import checked_weights
from odp_callbacks.gates.rules import (
    RULES,
    correct_rollouts,
    high_entropy,
    incorrect_rollouts,
    pass_rate,
    position,
    prefix,
    teacher_confidence,
    teacher_margin,
)


def example_tokens() -> Tokens:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    tokens = tokens_of(mask, [1.0, 0.0], ["a", "a"])
    student_logits, teacher_logits = torch.randn(2, 10, 5, generator=generator, dtype=torch.float64)
    return tokens.with_policies(student_logits, teacher_logits, torch.randint(5, (10,), generator=generator))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_weights_between_0_and_1_that_are_not_all_0(name: str) -> None:
    weights = checked_weights(RULES[name], example_tokens())
    assert 0 <= float(weights.min()) <= float(weights.max()) <= 1
    assert float(weights.sum()) > 0


@pytest.mark.parametrize("name", RULES)
def test_weights_are_as_exact_where_training_makes_bfloat16_the_default(name: str) -> None:
    expected = checked_weights(RULES[name], example_tokens())
    torch.set_default_dtype(torch.bfloat16)
    try:
        weights = checked_weights(RULES[name], example_tokens())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weights.double(), expected.double())


def test_each_token_is_either_correct_or_incorrect() -> None:
    tokens = example_tokens()
    assert incorrect_rollouts(tokens).tolist() == [0] * 6 + [1] * 4
    assert (incorrect_rollouts(tokens) + correct_rollouts(tokens) == 1).all()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_high_entropy_keeps_that_share_of_the_tokens(share: float) -> None:
    tokens = example_tokens()
    weights, entropy = high_entropy(tokens, share), tokens.need("student_entropy")
    assert int(weights.sum()) == round(10 * share)
    if share < 1:
        assert float(entropy[weights == 1].min()) >= float(entropy[weights == 0].max())


def test_high_entropy_counts_a_sampled_node_as_the_tokens_it_stands_for() -> None:
    from dataclasses import replace

    entropy = torch.tensor([3.0, 2.0, 1.0])
    tokens = replace(tokens_of(torch.ones(1, 3)), student_entropy=entropy, weight=torch.tensor([1.0, 8.0, 1.0]))
    assert high_entropy(tokens, 0.1).tolist() == [1, 0, 0]
    assert high_entropy(tokens, 0.5).tolist() == [1, 1, 0]


def test_confidence_is_one_over_the_number_of_equal_choices() -> None:
    tokens = tokens_of(torch.ones(1, 1)).with_policies(torch.zeros(1, 8), torch.zeros(1, 8), torch.tensor([0]))
    assert float(teacher_confidence(tokens)) == pytest.approx(1 / 8)


def test_the_margin_is_one_half_where_teacher_and_student_agree() -> None:
    student_logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    teacher_logits = torch.tensor([[0.0, 0.0], [5.0, 0.0], [-5.0, 0.0]])
    tokens = tokens_of(torch.ones(1, 3)).with_policies(student_logits, teacher_logits, torch.tensor([0, 0, 0]))
    weights = teacher_margin(tokens)
    assert float(weights[0]) == pytest.approx(0.5)
    assert float(weights[1]) < 0.5 < float(weights[2])


def test_position_rises_or_falls_with_the_sign_of_its_power() -> None:
    tokens = tokens_of(torch.ones(1, 4))
    assert position(tokens, 2.0).tolist() == [1 / 16, 1 / 4, 9 / 16, 1]
    falling = position(tokens, -1.0)
    assert (falling.diff() < 0).all()


def test_prefix_is_constant_then_decreases_to_0() -> None:
    tokens = tokens_of(torch.ones(1, 10))
    assert prefix(tokens, 0.2, 0.6).tolist() == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0])
    assert prefix(tokens, 0.5, 0.5).tolist() == [1] * 5 + [0] * 5


def test_pass_rate_is_largest_where_half_of_the_rollouts_succeed() -> None:
    def weight(rewards: list[float]) -> Tensor:
        return pass_rate(tokens_of(torch.ones(len(rewards), 1), rewards, ["a"] * len(rewards)))

    assert weight([1.0, 1.0]).tolist() == [0, 0]
    assert weight([1.0, 0.0]).tolist() == [0.5, 0.5]
    assert weight([1.0, 0.0, 0.0, 0.0]).tolist() == pytest.approx([(3 / 16) ** 0.5] * 4)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (partial(high_entropy, share=0.0), "`share` must lie in"),
        (partial(teacher_margin, scale=0.0), "`scale` must be positive"),
        (partial(prefix, full=0.5, end=0.2), "`full` and `end`"),
    ],
)
def test_numbers_out_of_range_are_refused(rule: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rule(example_tokens())
