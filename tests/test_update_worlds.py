"""Update gain in worlds small enough to enumerate, against autograd through the enumerated expectation."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from odp_callbacks.engine import BaseTeacher
from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.functional import lora_parameters
from odp_callbacks.functional.updates import leave_one_out_advantages, update_gain
from tests.helpers.worlds import World, make_world

PROMPTS = ("a b", "b")
FAMILIES = ["llama", "gpt2", "qwen3"]


@dataclass
class ExactQuestion:
    """Every response of a question with what an estimator could see of it."""

    probability: Tensor  # (R,)
    reward: Tensor  # (R,)
    score: Tensor  # (R, P), gradient of the log-probability
    direction: Tensor  # (R, P), distillation gradient
    gradient: Tensor  # (P,), of the expected reward, by autograd


def solve(family: str, prompt: str, temperature: float) -> ExactQuestion:
    world = make_world(family, size=3, horizon=2, prompt=prompt, structured=True)
    responses = world.responses(temperature)
    question = Question(prompt, world.row, world.prompt_ids)
    rollouts = [
        Rollout(question, response, world.text(response), response[-1] != 0, world.table[world.text(response)])
        for response in responses
    ]
    direction = distillation_direction("reverse_kl", None, None, temperature)
    gradients = UpdateGradients(world.model, world.tokenizer, {"base": BaseTeacher()}, direction, temperature)
    rows = [
        torch.cat([row.flatten(1) for row in gradients.rows([rollout], [1.0])[0].values()], dim=1)
        for rollout in rollouts
    ]
    return ExactQuestion(
        torch.tensor(list(responses.values()), dtype=torch.float64),
        torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64),
        torch.stack([row[0] for row in rows]).double(),
        torch.stack([row[1] for row in rows]).double(),
        success_gradient(world, temperature),
    )


def success_gradient(world: World, temperature: float) -> Tensor:
    """Autograd through the enumerated expectation of the reward."""
    parameters = list(lora_parameters(world.model).values())
    root = world.solve(temperature)[()]
    expectation = torch.softmax(root.logits / temperature, dim=-1) @ root.success
    return torch.cat([g.flatten() for g in torch.autograd.grad(expectation, parameters)])


@pytest.fixture(scope="module", params=list(product(FAMILIES, [0.7, 1.0])), ids=lambda p: f"{p[0]}-{p[1]}")
def questions(request: pytest.FixtureRequest) -> list[ExactQuestion]:
    family, temperature = request.param
    return [solve(family, prompt, temperature) for prompt in PROMPTS]


def pairs(question: ExactQuestion) -> list[tuple[float, Tensor, Tensor, Tensor]]:
    """Probability, success gradient and directions of correct and of incorrect rollouts, for every pair of rollouts."""
    found = []
    for a, b in product(range(len(question.reward)), repeat=2):
        index = torch.tensor([a, b])
        advantages = leave_one_out_advantages(question.reward[index], torch.zeros(2, dtype=torch.long))
        gradient = (advantages[:, None] * question.score[index]).mean(0)
        correct = question.reward[index] >= 1
        directions = torch.stack([question.direction[index][chosen].sum(0) for chosen in (correct, ~correct)])
        found.append((float(question.probability[a] * question.probability[b]), gradient, directions, correct))
    return found


def test_the_success_gradient_has_the_mean_that_autograd_gives(questions: list[ExactQuestion]) -> None:
    for question in questions:
        assert float(question.probability.sum()) == pytest.approx(1)
        mean = sum(probability * gradient for probability, gradient, *_ in pairs(question))
        torch.testing.assert_close(mean, question.gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["all", "correct", "incorrect"])
def test_update_gain_is_unbiased_for_every_direction_also_of_one_class(
    questions: list[ExactQuestion], classes: tuple[float, float]
) -> None:
    first, second = (pairs(question) for question in questions)
    weights = torch.tensor(classes, dtype=torch.float64)
    estimate, exact, share = 0.0, 0.0, 0.0
    for probability, gradient, *_ in first:
        for other, other_gradient, other_directions, _ in second:
            rows = torch.stack([gradient, other_gradient])
            direction = weights @ other_directions
            if not direction.any():  # no rollout of this class was drawn
                continue
            gain = update_gain(rows, torch.stack([torch.zeros_like(direction), direction]))[0]
            estimate += probability * other * float(gain)
            share += probability * other
    for other, _, other_directions, _ in second:
        direction = weights @ other_directions
        if direction.any():
            exact += other * float(questions[0].gradient @ direction / direction.norm())
    assert share > 0.1
    assert estimate == pytest.approx(exact, rel=1e-6, abs=1e-6)


def test_with_the_own_question_in_the_direction_the_split_by_correctness_is_biased(
    questions: list[ExactQuestion],
) -> None:
    differences = []
    for question in questions:
        own, exact = 0.0, 0.0
        for probability, gradient, directions, correct in pairs(question):
            if not bool(correct.any()):
                continue
            unit = directions[0] / directions[0].norm()
            own += probability * float(gradient @ unit)
            exact += probability * float(question.gradient @ unit)
        differences.append(abs(own - exact) / float(question.gradient.norm()))
    assert max(differences) > 0.02
