"""Nodes in proportion to expected contributions: unbiased sums, no weight that explodes, and a guess by theory."""

import numpy as np
import pytest
import torch

from odp_callbacks.engine.gradients.node_logits import NodeLogits
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.teachers import ModelTeacher
from odp_callbacks.engine.tree.contributions import (
    EVEN_SHARE,
    expected_contributions,
    pick_by_contribution,
)
from odp_callbacks.engine.tree.nodes import CANDIDATES, BalancedNodes, ContributionNodes, Node
from odp_callbacks.functional import distillation_logit_gradient
from tests.helpers.models import tiny, tiny_base


def test_sums_are_unbiased_and_no_weight_explodes() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = [Node(index // 8, index % 8, 1 / (1 + index % 3)) for index in range(120)]
    contributions = torch.rand(120, generator=generator, dtype=torch.float64) ** 6
    values = contributions.numpy() * np.random.default_rng(0).choice([-1, 1], 120) + 0.1
    full = sum(value / node.inclusion for node, value in zip(nodes, values, strict=True))
    value_of = {(node.rollout, node.depth): value for node, value in zip(nodes, values, strict=True)}
    total_weight = sum(1 / node.inclusion for node in nodes)
    sums, counts = [], []
    for _ in range(2000):
        kept = pick_by_contribution(nodes, contributions, 30, generator)
        counts.append(len(kept))
        sums.append(sum(value_of[node.rollout, node.depth] / node.inclusion for node in kept))
        assert max(1 / node.inclusion for node in kept) <= total_weight / 30 / EVEN_SHARE * (1 + 1e-9)
    assert np.mean(counts) == pytest.approx(30, abs=0.1)
    assert abs(np.mean(sums) - full) < 3.5 * np.std(sums) / np.sqrt(len(sums))


def test_without_any_expectation_nodes_are_drawn_by_their_weights() -> None:
    nodes = [Node(0, depth, 1 / (1 + depth)) for depth in range(16)]
    kept = pick_by_contribution(nodes, torch.zeros(16, dtype=torch.float64), 8, torch.Generator().manual_seed(0))
    weights = [1 / node.inclusion for node in kept if node.depth > 2]
    assert max(weights) < 1.5 * min(weights)
    assert pick_by_contribution([], torch.zeros(0), 8, torch.Generator()) == []


def test_candidates_are_a_multiple_of_what_is_measured() -> None:
    rollout = Rollout(Question("0", {}, torch.tensor([1])), tuple(range(100)), "", False)
    generator = torch.Generator().manual_seed(0)
    selector = ContributionNodes()
    assert selector.wanted(rollout) == len(BalancedNodes()(rollout, generator)) == 8
    assert len(selector(rollout, generator)) == CANDIDATES * 8
    assert ContributionNodes(5).wanted(rollout) == 5
    assert [selector.wanted(Rollout(rollout.question, (1,) * length, "", False)) for length in (1, 2, 3, 8)] == [
        1, 2, 3, 4,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`count` must be a positive integer"):
        ContributionNodes(0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_guess_is_the_standard_deviation_of_the_gain_on_the_logits(temperature: float) -> None:
    """By Monte Carlo, with an independent success of each token."""
    student, teacher = tiny(), ModelTeacher(tiny_base(seed=3))
    question = Question("0", {}, torch.tensor([1, 5, 6]))
    question.teacher_prompt_ids["other"] = question.prompt_ids
    rollouts = [Rollout(question, (7, 8, 9), "", False, reward=reward) for reward in (0.0, 1.0)]
    nodes = [Node(index, depth, 1.0) for index in range(2) for depth in range(3)]

    def direction(student_logits: torch.Tensor, teacher_logits: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        return distillation_logit_gradient(student_logits, teacher_logits, temperature=temperature)

    student.requires_grad_(False)
    logits = NodeLogits(student, {"other": teacher}, rollouts, nodes)
    guess = expected_contributions(logits, direction, temperature)
    (first, _) = logits.of_question(0)
    for place in range(3):
        policy = torch.softmax(first.student[place].double() / temperature, -1)
        pull = direction(first.student[[place]], first.teachers[0][[place]], torch.tensor([0]))[0].double()
        success = torch.bernoulli(torch.full((200_000, len(policy)), 0.5, dtype=torch.float64))
        ideal = policy * (success - (success @ policy)[:, None])
        gains = ideal @ pull / pull.norm()
        assert 0.5 * float(guess[place]) == pytest.approx(float(gains.std()), rel=0.01)
    torch.testing.assert_close(guess[:3], guess[3:])
