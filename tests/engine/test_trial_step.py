"""A step that is taken on trial: it moves the parameters by what was asked for, and leaves nothing behind."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.trial_step import success_by_question, trial_step
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import flat_parameters
from tests.helpers.probes import ROWS, word_reward
from tests.helpers.worlds import World


def random_direction(student: torch.nn.Module) -> torch.Tensor:
    size = sum(parameter.numel() for parameter in lora_parameters(student).values())
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def test_parameters_move_by_the_length_and_return_bit_for_bit(student: torch.nn.Module) -> None:
    direction, before = random_direction(student), flat_parameters(student)
    with trial_step(student, direction, 0.7):
        moved = flat_parameters(student) - before
        assert moved.norm().item() == pytest.approx(0.7)
        assert torch.cosine_similarity(moved, direction.to(moved), dim=0).item() == pytest.approx(1.0)
    assert torch.equal(flat_parameters(student), before)


def test_parameters_return_after_an_error(student: torch.nn.Module) -> None:
    before = flat_parameters(student)
    with pytest.raises(KeyboardInterrupt), trial_step(student, random_direction(student), 0.7):
        raise KeyboardInterrupt
    assert torch.equal(flat_parameters(student), before)


def test_a_direction_that_cannot_be_used_is_refused(student: torch.nn.Module) -> None:
    direction = random_direction(student)
    for wrong, message in ((direction[1:], "one for each LoRA parameter"), (0 * direction, "positive finite norm")):
        with pytest.raises(ValueError, match=message), trial_step(student, wrong, 0.1):
            pass


def test_success_after_a_step_is_that_of_enumeration(world: World) -> None:
    """Along the exact gradient, success rises by its norm times the length, and sampling finds that success."""
    parameters = list(lora_parameters(world.model).values())

    def success() -> torch.Tensor:
        root = world.solve()[()]
        return torch.softmax(root.logits, dim=-1) @ root.success

    gradients = torch.autograd.grad(success(), parameters)
    direction = torch.cat([gradient.flatten() for gradient in gradients])
    with torch.no_grad():
        before = success().item()
        with trial_step(world.model, direction, 1e-4):
            assert (success().item() - before) / 1e-4 == pytest.approx(direction.norm().item(), rel=1e-2)
        probe = Probe(world.model, world.tokenizer, world.reward, "base", ProbeConfig(max_new_tokens=world.horizon))
        questions = probe.encode([world.row] * 2, ids=["a", "b"])
        with trial_step(world.model, direction, 1.0):
            after = success().item()
            sampled = success_by_question(probe, questions, 1000, seed=0)
    assert after - before > 0.04, "the step must be large enough to be seen"
    assert sampled.shape == (2,)
    assert sampled.mean() == pytest.approx(after, abs=0.02)


def test_draws_are_those_of_a_probe_and_depend_on_the_question_alone(
    student: torch.nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    probe = Probe(student, tokenizer, word_reward, "base", budget=0, rollouts_per_question=3, max_new_tokens=6)
    questions = probe.encode(ROWS, ids=["0", "1", "2"])
    found = success_by_question(probe, questions, 3, seed=5)
    rewards = torch.tensor([rollout.reward for rollout in probe.run(questions, seed=5).rollouts]).view(3, 3)
    assert found == pytest.approx(rewards.mean(dim=1).numpy())
    assert success_by_question(probe, questions[1:], 3, seed=5) == pytest.approx(found[1:])
    assert found != pytest.approx(success_by_question(probe, questions, 3, seed=6))


def test_a_question_without_reward_is_refused(student: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    def no_reward(prompts: list[str], completions: list[str], **columns: object) -> list[None]:
        return [None] * len(completions)

    probe = Probe(student, tokenizer, no_reward, "base", budget=0, max_new_tokens=3)
    with pytest.raises(ValueError, match="got no reward"):
        success_by_question(probe, probe.encode(ROWS), 2, seed=0)
