"""Expected contributions: a guess by theory, and factors that let no weight explode."""

import pytest
import torch

from odp_callbacks.engine.gradients.node_logits import NodeLogits
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.teachers import ModelTeacher
from odp_callbacks.engine.tree.contributions import EVEN_SHARE, draw_factors, expected_contributions
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.functional import distillation_logit_gradient
from tests.helpers.models import tiny, tiny_base


def test_factors_have_a_mean_of_one_and_none_is_small() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = [Node(index // 8, index % 8, 1 / (1 + index % 3)) for index in range(120)]
    contributions = torch.rand(120, generator=generator, dtype=torch.float64) ** 6
    factors = draw_factors(nodes, contributions)
    weights = torch.tensor([1 / node.inclusion for node in nodes], dtype=torch.float64)
    assert float(weights @ factors / weights.sum()) == pytest.approx(1)
    assert float(factors.min()) >= EVEN_SHARE
    torch.testing.assert_close(factors.argsort(), contributions.argsort())


def test_without_any_expectation_nodes_are_drawn_by_their_weights() -> None:
    nodes = [Node(0, depth, 1 / (1 + depth)) for depth in range(16)]
    assert (draw_factors(nodes, torch.zeros(16, dtype=torch.float64)) == 1).all()
    assert draw_factors([], torch.zeros(0, dtype=torch.float64)).tolist() == []


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
