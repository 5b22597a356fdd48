"""A teacher's prompt and its logits on the student's responses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.prompts import Question, encode_prompt
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.teachers.kinds import Teacher


def teacher_prompt_ids(teacher: Teacher, tokenizer: Any, question: Question) -> Tensor:
    """The prompt that a teacher is given, encoded.

    Args:
        teacher: The teacher.
        tokenizer: The student's tokenizer.
        question: The question.

    Returns:
        ``(P',)`` int64: the student's own prompt for a teacher without a context.
    """
    return question.prompt_ids if teacher.context is None else encode_prompt(tokenizer, teacher.prompt(question.row))


def teacher_logits(
    teacher: Teacher,
    student: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
) -> list[Tensor]:
    """The teacher's logits at chosen depths of responses.

    Args:
        teacher: The teacher.
        student: The student, with its adapters.
        prompts: The teacher's prompt for each response, ``(P'_r,)`` int64.
        responses: The student's response tokens.
        depths: ``N_r`` depths for each response.

    Returns:
        ``(N_r, V')`` for each response, on the student's device. ``V'`` is the smaller of the two models' numbers of
        logits; the other model's additional ones are padding rows (:meth:`ModelTeacher.check`) and are left out.
    """
    device = next(student.parameters()).device
    logit_count = vocabulary_size(student)
    with torch.no_grad(), teacher.policy(student) as (model, parameters):
        all_logits = response_logits(model, prompts, responses, depths, parameters)
    return [logits[..., :logit_count].to(device) for logits in all_logits]
