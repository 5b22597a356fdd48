"""A small trial that tells what the measurement of an update will take, before anything is sampled."""

import torch

from odp_callbacks.engine.attention_plans import without_attention_plans
from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.engines.interface import EngineError
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.teachers import ServedTeacher
from odp_callbacks.engine.unit_costs import PASS, UnitCosts, work_of_sequences
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.update_time import GAIN

TRIAL_SHARE = 0.1
"""Share of a probe's seconds that trials may take; the first one is of a few tokens and may take longer."""
FIRST_LENGTH = 16
"""Tokens of the first trial's response."""
GROWTH = 4
"""How many times longer the next trial's response is: a short one measures what a pass takes whatever its length."""


@without_attention_plans()
def try_update(
    gradients: UpdateGradients, question: Question, max_new_tokens: int, costs: UnitCosts, deadline: Deadline
) -> None:
    """Compute the gradients of a made-up response, and of longer ones while that takes little of the time.

    A trial that fails, for lack of memory for example, says nothing here: the measurement itself may have another way,
    and gives the warning if it has none.

    Args:
        gradients: Computes the gradients.
        question: A question, whose prompt is also the response.
        max_new_tokens: The longest response.
        costs: Receives what the longest trial took, if one succeeded, and a forward pass of the student.
        deadline: Of the probe.

    Raises:
        EngineError: If the server of a teacher does not answer, refuses, or answers nonsense.
    """
    assert deadline.seconds is not None
    start, length, growth = deadline.elapsed_seconds, min(FIRST_LENGTH, max_new_tokens), float(GROWTH)
    rollout, seconds = _made_up(question, length), 0.0
    while True:
        longer = _made_up(question, length)
        try:
            _gradient_seconds(gradients, longer, deadline)  # the first pass at a length may prepare much
            previous, seconds = seconds, _gradient_seconds(gradients, longer, deadline)
        except EngineError:
            raise
        except (MemoryError, RuntimeError):
            break
        rollout = longer
        growth = min(GROWTH, seconds / previous) if previous else growth
        spent = deadline.elapsed_seconds - start
        if length == max_new_tokens or spent + 2 * growth * seconds > TRIAL_SHARE * deadline.seconds:
            break
        length = min(GROWTH * length, max_new_tokens)
    (work,) = work_of_sequences(gradients.student, [len(rollout.sequence)])
    if seconds:
        costs.record(GAIN, work, seconds)
    costs.record(PASS, work, _pass_seconds(gradients, rollout, deadline))


def _made_up(question: Question, length: int) -> Rollout:
    """A rollout that repeats the prompt."""
    prompt = question.prompt_ids.tolist()
    response = (prompt * (1 + length // len(prompt)))[:length]
    return Rollout(question, tuple(response), "", truncated=True, reward=0.0)


def _gradient_seconds(gradients: UpdateGradients, rollout: Rollout, deadline: Deadline) -> float:
    """Seconds for the gradients of a rollout, with the time that servers of teachers take."""
    for teacher in gradients.teachers.values():
        if isinstance(teacher, ServedTeacher):
            teacher.begin_probe()  # it would answer from memory
    start = deadline.elapsed_seconds
    rows, _ = gradients.segment_rows([rollout], [1.0], [0])
    rows.sum().item()  # waits for an accelerator
    return deadline.elapsed_seconds - start


def _pass_seconds(gradients: UpdateGradients, rollout: Rollout, deadline: Deadline) -> float:
    """Seconds for one forward pass of the student."""
    start = deadline.elapsed_seconds
    device = next(gradients.student.parameters()).device
    with torch.no_grad():
        gradients.student(input_ids=rollout.sequence[None].to(device)).logits[0, -1].sum().item()
    return deadline.elapsed_seconds - start
