"""Update gain against plain loops, against autograd and enumeration in ``tests/test_update_worlds.py``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.functional.updates import leave_one_out_advantages, step_gain, sum_of_other_rows, update_gain


def draw(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 7), st.integers(1, 9), st.integers(0, 1000))
def test_it_is_the_inner_product_with_the_unit_direction_of_the_other_questions(count, size, seed):
    gradients, directions = draw(count, size, seed), draw(count, size, seed + 1)
    gains = update_gain(gradients, directions)
    for i in range(count):
        others = sum(directions[j] for j in range(count) if j != i)
        torch.testing.assert_close(gains[i], gradients[i] @ others / others.norm())


@given(st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_the_length_of_the_direction_does_not_matter(scale, seed):
    gradients, directions = draw(5, 4, seed), draw(5, 4, seed + 1)
    torch.testing.assert_close(update_gain(gradients, scale * directions), update_gain(gradients, directions))
    torch.testing.assert_close(update_gain(scale * gradients, directions), scale * update_gain(gradients, directions))


@pytest.mark.parametrize(
    ("rows", "undefined"),
    [
        ([[1.0, 2.0]], [0]),
        ([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], [0]),
        ([[0.1, 0.3], [0.7, 0.2], [-0.7, -0.2]], [0]),
        ([[0.0, 0.0]] * 3, [0, 1, 2]),
    ],
)
def test_a_direction_of_zero_is_nan_and_not_rounding(rows, undefined):
    directions = torch.tensor(rows)
    gains = update_gain(torch.ones_like(directions), directions)
    assert gains.isnan().nonzero().flatten().tolist() == undefined


def test_half_precision_is_computed_in_single():
    gradients, directions = draw(6, 50, 0).bfloat16(), draw(6, 50, 1).bfloat16()
    gains = update_gain(gradients, directions)
    assert gains.dtype == torch.bfloat16
    torch.testing.assert_close(gains, update_gain(gradients.float(), directions.float()).bfloat16())


def test_bad_input_is_answered_with_the_shapes():
    with pytest.raises(ValueError, match=r"\(N, P\).*\(2, 3\) and \(3, 3\)"):
        update_gain(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(TypeError, match="`direction` must be a floating-point tensor"):
        update_gain(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`rewards` and `questions`.*\(2,\) and \(3,\)"):
        leave_one_out_advantages(torch.zeros(2), torch.zeros(3, dtype=torch.long))


@given(st.integers(1, 6), st.integers(0, 100))
def test_the_sum_of_the_other_rows(count, seed):
    rows = draw(count, 3, seed)
    torch.testing.assert_close(sum_of_other_rows(rows), rows.sum(0) - rows, atol=1e-12, rtol=0)


def test_a_rollout_is_compared_with_its_siblings_and_a_lone_one_with_the_other_questions():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    found = leave_one_out_advantages(rewards, torch.tensor([7, 7, 3, 9]))
    assert found.tolist() == pytest.approx([1.0, -1.0, 0.5 - 1.25 / 3, 0.25 - 0.5])
    assert leave_one_out_advantages(torch.tensor([0.5]), torch.tensor([0])).tolist() == [0.5]
    assert leave_one_out_advantages(torch.ones(4), torch.tensor([0, 0, 1, 1])).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("questions", [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_equal_rewards_of_any_size_give_exactly_zero(questions: list[int], dtype: torch.dtype) -> None:
    for reward in (0.1, 0.7, -2.3):
        found = leave_one_out_advantages(torch.full((7,), reward, dtype=dtype), torch.tensor(questions))
        assert found.tolist() == [0.0] * 7
    rewards = torch.where(torch.tensor(questions) == 0, 0.1, 0.7).to(dtype)
    if questions.count(2) == 0:  # nothing is compared between questions
        assert leave_one_out_advantages(rewards, torch.tensor(questions)).tolist() == [0.0] * 7


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 1000))
def test_the_gain_of_a_step_by_plain_loops(questions, seed):
    rewards, after, before = draw(3, len(questions), seed)
    gains = step_gain(rewards, torch.tensor(questions), after, before)
    for i, question in enumerate(questions):
        siblings = [rewards[j] for j in range(len(questions)) if questions[j] == question and j != i]
        others = [rewards[j] for j in range(len(questions)) if questions[j] != question]
        compared = siblings or others
        baseline = sum(compared) / len(compared) if compared else 0.0
        torch.testing.assert_close(gains[i], (rewards[i] - baseline) * (after[i] - before[i]))


def test_a_step_needs_a_number_for_each_rollout():
    rewards, questions = torch.ones(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`log_probs_before` must have one number for each rollout, \(2,\)"):
        step_gain(rewards, questions, torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match="`log_probs_after` must be a floating-point tensor"):
        step_gain(rewards, questions, torch.zeros(2, dtype=torch.long), torch.zeros(2))
