"""A teacher's prompt and its logits on the student's responses."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.prompts import Prompt, Question, encode_prompt
from odp_callbacks.engine.sampling.model_forward import check_embedded, vocabulary_size
from odp_callbacks.engine.teachers.kinds import Teacher
from odp_callbacks.engine.teachers.served import ServedTeacher
from odp_callbacks.engine.user_defaults import call_with_user_defaults


def teacher_prompt_ids(teacher: Teacher, tokenizer: Any, question: Question) -> Tensor:
    """The prompt that a teacher is given, encoded by its own tokenizer if it has one.

    Args:
        teacher: The teacher.
        tokenizer: The student's tokenizer.
        question: The question.

    Returns:
        ``(P',)`` int64: the student's own prompt for a teacher with neither a context nor a tokenizer.
    """
    own_tokenizer = getattr(teacher, "tokenizer", None)
    # Rows that came as token ids have no text of their own.
    if teacher.context is None and (own_tokenizer is None or "input_ids" in question.row):
        return question.prompt_ids
    used_tokenizer = tokenizer if own_tokenizer is None else own_tokenizer
    prompt = call_with_user_defaults(teacher.prompt, question.row)
    # A template in place of the tokenizer's own is one in place of the student's.
    template = question.template if own_tokenizer is None else replace(question.template, template=None)
    return _without_second_bos(encode_prompt(used_tokenizer, prompt, template), used_tokenizer, prompt)


def _without_second_bos(prompt_ids: Tensor, tokenizer: Any, prompt: Prompt) -> Tensor:
    """The prompt without the BOS that the tokenizer put before a string which a chat template had begun with one."""
    bos = getattr(tokenizer, "bos_token", None)
    if isinstance(prompt, str) and bos and prompt.startswith(bos) and len(prompt_ids) > 1:
        return prompt_ids[int(prompt_ids[0] == prompt_ids[1] == tokenizer.bos_token_id) :]
    return prompt_ids


def teacher_logits(
    teacher: Teacher,
    student: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
    student_logits: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The teacher's logits at chosen depths of responses.

    Args:
        teacher: The teacher.
        student: The student, with its adapters.
        prompts: The teacher's prompt for each response, ``(P'_r,)`` int64.
        responses: The student's response tokens.
        depths: ``N_r`` depths for each response.
        student_logits: ``(N_r, V)`` for each response, the student's own logits there; a
            :class:`~odp_callbacks.engine.teachers.ServedTeacher` needs them for the tokens that do not come back.

    Returns:
        ``(N_r, V')`` for each response, on the student's device. ``V'`` is the smaller of the two models' numbers of
        logits; the other model's additional ones are padding rows (:meth:`ModelTeacher.check`) and are left out.

    Raises:
        ValueError: If the teacher has no embedding for a token, or is served and there are no logits of the student.
        EngineError: If the server of a teacher does not answer, refuses, or answers nonsense.
    """
    if isinstance(teacher, ServedTeacher) and student_logits is not None:
        returned = teacher.returned_tokens(prompts, responses, depths)
        return [part.logits(own) for part, own in zip(returned, student_logits, strict=True)]
    device = next(student.parameters()).device
    logit_count = vocabulary_size(student)
    with torch.no_grad(), teacher.policy(student) as (model, parameters):
        check_embedded(model, prompts, "a prompt of `teachers`")
        check_embedded(model, responses, "a response that the student sampled and one of `teachers` reads")
        all_logits = response_logits(model, prompts, responses, depths, parameters)
    return [logits[..., :logit_count].to(device) for logits in all_logits]
