"""Responses that each teacher samples by itself, under its own context, to find out how well it answers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.engines.choice import engine_of_other_policies
from odp_callbacks.engine.engines.student_engine import prepared_engine
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Question, Row
from odp_callbacks.engine.rollouts import Rollout, end_tokens, sample_rollouts, score_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teachers import Teacher
from odp_callbacks.engine.timing import Progress
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.records import TeacherResponse


def sample_teacher_responses(
    probe: Probe,
    rows: Sequence[Row] | Sequence[Question],
    *,
    responses: int,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> tuple[TeacherResponse, ...]:
    """Let every teacher answer the questions by itself, under its own context, and verify the responses.

    A distilling teacher only reads the student's responses. Here it writes its own, with the temperature, the length
    and the reward of the student's rollouts, so that both success rates can be compared. The student is afterwards as
    it was before. Teachers on the student's base are sampled by the probe's engine, other models by themselves.

    Args:
        probe: Has the student, the teachers, the reward function and the configuration.
        rows: Questions in TRL's convention, or the questions that :meth:`~odp_callbacks.Probe.validate` returned.
        responses: Number of responses of each teacher to each question.
        seed: Seed of all random draws.
        journal: Stores responses as they finish; those that it holds already are not sampled again.
        progress: Called with the stage's name, the number of teachers done, and their number.

    Returns:
        The responses, teacher by teacher, for ``dataclasses.replace(report, teacher_responses=...)``. Those that the
        reward function gave None are left out.

    Raises:
        ValueError: If ``responses`` is not positive, or a row cannot be used.
    """
    if responses < 1:
        raise ValueError(f"`responses` must be a positive integer, but {responses!r} was given.")
    report = progress or (lambda stage, done, total: None)
    questions, config = probe.encode(rows), probe.config
    records: list[TeacherResponse] = []
    with (
        preserving_training_state(probe.student),
        closing(Verifier(probe.reward, config.reward_timeout, processes=config.reward_processes)) as verifier,
    ):
        for number, (name, teacher) in enumerate(probe.teachers.items()):
            report("teachers' responses", number, len(probe.teachers))
            sampled = _rollouts(name, teacher, probe, questions, responses, seed, journal)
            scored = score_rollouts(verifier, sampled)
            records += [_record(name, rollout, config) for rollout in scored if not math.isnan(rollout.reward)]
    report("teachers' responses", len(probe.teachers), len(probe.teachers))
    return tuple(records)


def _rollouts(
    name: str,
    teacher: Teacher,
    probe: Probe,
    questions: Sequence[Question],
    responses: int,
    seed: int,
    journal: Journal | None,
) -> list[Rollout]:
    """The responses of one teacher to its own prompts."""
    config = probe.config
    asked = [replace(question, prompt_ids=question.teacher_prompt_ids[name]) for question in questions]
    own_tokenizer = getattr(teacher, "tokenizer", None)
    tokenizer = probe.tokenizer if own_tokenizer is None else own_tokenizer
    # The draws are named after the teacher, so that they do not depend on the other teachers.
    randomness = Randomness(Randomness(seed).key("teacher responses", name))
    with ExitStack() as stack:
        model, parameters = stack.enter_context(teacher.policy(probe.student))
        stack.enter_context(_with_parameters(model, parameters))
        stack.enter_context(preserving_training_state(model))
        eos_token_ids = end_tokens(model, tokenizer, config.eos_token_ids)
        engine = stack.enter_context(
            prepared_engine(
                # The engine has the student's base, so that another model has to sample by itself.
                engine_of_other_policies(probe.engine) if model is probe.student else None,
                model,
                asked,
                max_new_tokens=config.max_new_tokens,
                stop_token_ids=eos_token_ids,
                randomness=randomness,
            )
        )
        return sample_rollouts(
            model,
            tokenizer,
            asked,
            per_question=responses,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            eos_token_ids=eos_token_ids,
            randomness=randomness,
            batch_size=config.batch_size,
            journal=journal,
            engine=engine,
        )


@contextmanager
def _with_parameters(model: nn.Module, parameters: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The model with other values of some parameters; afterwards it has its own, in the same memory."""
    named_parameters = dict(model.named_parameters())
    kept = {name: named_parameters[name].data for name in parameters or {}}
    try:
        for name, value in (parameters or {}).items():
            named_parameters[name].data = value
        yield
    finally:
        for name, value in kept.items():
            named_parameters[name].data = value


def _record(teacher: str, rollout: Rollout, config: ProbeConfig) -> TeacherResponse:
    return TeacherResponse(
        teacher,
        rollout.question.id,
        rollout.text,
        rollout.reward,
        rollout.reward >= config.success_threshold,
        rollout.truncated,
    )
