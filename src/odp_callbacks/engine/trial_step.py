"""A trial of a direction: move the LoRA parameters along it, measure the student's success, and move them back."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.engine.engines.choice import engine_of_other_policies
from odp_callbacks.engine.engines.student_engine import prepared_engine
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import sample_rollouts, score_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.records import Floats


@contextmanager
def trial_step(student: nn.Module, direction: Tensor, length: float) -> Iterator[None]:
    """Move the trained LoRA parameters along a direction within a block; afterwards they are as before, bit for bit.

    Args:
        student: A model with LoRA.
        direction: ``(P,)``, over all LoRA parameters in their order, such as one of
            :attr:`~odp_callbacks.engine.probe.Probe.summed_directions`; only its direction counts.
        length: Euclidean length of the step.

    Raises:
        ValueError: If ``direction`` has another number of entries than the student has LoRA parameters, or is zero.
    """
    parameters = list(lora_parameters(student).values())
    sizes = [parameter.numel() for parameter in parameters]
    if direction.shape != (sum(sizes),):
        raise ValueError(
            f"`direction` must have {sum(sizes):,} entries, one for each LoRA parameter, but has the shape "
            f"{tuple(direction.shape)}."
        )
    norm = float(direction.double().norm())
    if not 0 < norm < float("inf"):
        raise ValueError(f"`direction` must have a positive finite norm, but its norm is {norm}.")
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, part in zip(parameters, direction.split(sizes), strict=True):
                parameter.add_(part.to(parameter).view_as(parameter), alpha=length / norm)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def success_by_question(probe: Probe, questions: Sequence[Question], per_question: int, *, seed: int) -> Floats:
    """Sample the student's responses and return the mean reward of each question, ``(N,)``.

    Draws depend on the seed and the question alone. The same seed before and after a step therefore gives responses
    that differ only where the step changes them, and a narrower interval of the difference. The engine of the probe
    gets the student as it is now, so each call sends the adapter anew.

    Args:
        probe: Has the student, its tokenizer, the verifier and the options of sampling.
        questions: From :meth:`~odp_callbacks.engine.probe.Probe.encode` or ``validate``, with different ids.
        per_question: Number of responses to each.
        seed: Of the draws.

    Raises:
        ValueError: If a response got no reward.
    """
    config = probe.config
    randomness = Randomness(seed)
    with (
        preserving_training_state(probe.student),
        closing(Verifier(probe.reward, config.reward_timeout, processes=config.reward_processes)) as verifier,
        prepared_engine(
            engine_of_other_policies(probe.engine),
            probe.student,
            questions,
            max_new_tokens=config.max_new_tokens,
            stop_token_ids=probe.eos_token_ids,
            randomness=randomness,
        ) as engine,
    ):
        verifier.host = probe.reward_host
        rollouts = sample_rollouts(
            probe.student,
            probe.tokenizer,
            questions,
            per_question=per_question,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            eos_token_ids=probe.eos_token_ids,
            randomness=randomness,
            batch_size=config.batch_size,
            engine=engine,
        )
        rewards = np.array([rollout.reward for rollout in score_rollouts(verifier, rollouts)])
    if np.isnan(rewards).any():
        raise ValueError("`questions` has one with a response that got no reward; give questions that `reward` scores.")
    return np.asarray(rewards.reshape(len(questions), per_question).mean(axis=1), dtype=np.float64)
