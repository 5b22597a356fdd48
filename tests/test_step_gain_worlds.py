"""The gain of a step in worlds small enough to enumerate, against the exact change of the expected reward."""

from itertools import pairwise, product

import pytest
import torch

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.update.response_log_probs import response_log_probs
from odp_callbacks.engine.update.split_model import SplitModel
from odp_callbacks.engine.update.taken_step import KeptParameters
from odp_callbacks.functional import lora_parameters, step_gain
from tests.helpers.worlds import World, make_world

CASES = [*product(["llama", "gpt2", "qwen3"], [0.7, 1.0])]


def expected_reward(world: World, temperature: float) -> float:
    return sum(
        probability * world.table[world.text(response)]
        for response, probability in world.responses(temperature).items()
    )


def take_step(world: World, temperature: float, length: float) -> None:
    """Move the LoRA parameters partly along the success gradient, and partly in a random direction."""
    generator = torch.Generator().manual_seed(7)
    parameters = list(lora_parameters(world.model).values())
    root = world.solve(temperature)[()]
    gradients = torch.autograd.grad(torch.softmax(root.logits / temperature, dim=-1) @ root.success, parameters)
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += length * (gradient / norm + 0.05 * noise)


def mean_estimate_and_truth(family: str, temperature: float, length: float, siblings: int = 2) -> tuple[float, float]:
    """The estimate's mean over all pairs of responses that the student gives after a step, and the exact change."""
    world = make_world(family, size=3, horizon=2, structured=True)
    before = KeptParameters.of(world.model, 0)
    success_before = expected_reward(world, temperature)
    take_step(world, temperature, length)
    responses = world.responses(temperature)
    question = Question("0", world.row, world.prompt_ids)
    rollouts = [
        Rollout(question, response, world.text(response), response[-1] != 0, world.table[world.text(response)])
        for response in responses
    ]
    model = SplitModel(world.model)
    after_step = torch.stack([p.sum() for p in response_log_probs(model, rollouts, temperature)])
    before_step = torch.stack([p.sum() for p in response_log_probs(model, rollouts, temperature, before.values)])
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    probabilities = torch.tensor(list(responses.values()), dtype=torch.float64)
    torch.testing.assert_close(after_step.exp(), probabilities)
    mean = 0.0
    for drawn in product(range(len(rollouts)), repeat=siblings):
        index = torch.tensor(drawn)
        questions = torch.zeros(siblings, dtype=torch.long)
        gains = step_gain(rewards[index], questions, after_step[index], before_step[index])
        mean += float(probabilities[index].prod() * gains.mean())
    return mean, expected_reward(world, temperature) - success_before


@pytest.mark.parametrize(("family", "temperature"), CASES)
def test_the_mean_over_all_responses_is_the_change_of_the_expected_reward(family: str, temperature: float) -> None:
    estimates, changes = zip(
        *(mean_estimate_and_truth(family, temperature, 0.02 / 2**halvings) for halvings in range(3)), strict=True
    )
    errors = [estimate - change for estimate, change in zip(estimates, changes, strict=True)]
    assert abs(changes[0]) > 1e-3
    assert abs(errors[2]) < 0.05 * abs(changes[2])
    for longer, shorter in pairwise(errors):
        assert longer / shorter == pytest.approx(4, rel=0.15), "the error is of second order"


def test_a_single_rollout_is_unbiased_too() -> None:
    pair, change = mean_estimate_and_truth("llama", 1.0, 0.002)
    single, _ = mean_estimate_and_truth("llama", 1.0, 0.002, siblings=1)
    assert single == pytest.approx(change, rel=0.05)
    # Without a baseline the mean is another function of second order.
    assert single == pytest.approx(pair, rel=0.05)
