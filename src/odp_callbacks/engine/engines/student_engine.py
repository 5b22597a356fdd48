"""An engine during one probe: it gets the student's adapter when it is first needed, and what it answers is checked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from typing_extensions import Unpack

from odp_callbacks.engine.engines.agreement import check_agreement
from odp_callbacks.engine.engines.interface import EngineSample, SamplingEngine, SamplingOptions, check_samples
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.sampling.randomness import Randomness


class StudentEngine:
    """Samples from a student with an engine.

    Args:
        engine: The engine.
        student: The student, in evaluation mode.
        step: Distinguishes this probe's adapter from the earlier ones.

    Attributes:
        name: Of the engine.
    """

    def __init__(self, engine: SamplingEngine, student: nn.Module, step: int) -> None:
        self.engine, self.student, self.step = engine, student, step
        self.name = engine.name
        self._vocabulary = vocabulary_size(student)

    def prepare(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        randomness: Randomness,
    ) -> None:
        """Give the engine the student's adapter, and check that it samples from that.

        Args:
            questions: Those of the probe; a few prompts tell whether the engine samples from this policy.
            max_new_tokens: The largest number of tokens that a response may have.
            stop_token_ids: Tokens that end a response.
            randomness: The source of all random draws.

        Raises:
            EngineError: If it does not.
        """
        self.engine.sync(self.student, self.step)
        check_agreement(
            self.engine,
            self.student,
            [question.prompt_ids for question in questions],
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            randomness=randomness,
        )

    def sample(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[EngineSample]:
        """Sample one response to each prompt, and check the answers; the arguments are those of an engine."""
        samples = self.engine.sample(prompts, **options)
        check_samples(self.name, samples, options["max_tokens"], options["stop_token_ids"], self._vocabulary)
        return samples


@contextmanager
def prepared_engine(
    engine: SamplingEngine | None,
    student: nn.Module,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    randomness: Randomness,
) -> Iterator[StudentEngine | None]:
    """The engine with a student's policy of the moment, for sampling beside a probe; it gives that back at the end.

    Args:
        engine: The engine; None where the model itself samples, and then nothing is done.
        student: The student, in evaluation mode, with the weights and the adapter that shall be sampled from.
        questions: What it will be asked; without any, nothing is done.
        max_new_tokens: The largest number of tokens that a response may have.
        stop_token_ids: Tokens that end a response.
        randomness: The source of all random draws.

    Raises:
        EngineError: If the engine does not sample from the student.
    """
    with engine_of_run(engine if questions else None, student, step=0) as of_student:
        if of_student is not None:
            of_student.prepare(
                questions, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids, randomness=randomness
            )
        yield of_student


@contextmanager
def engine_of_run(engine: SamplingEngine | None, student: nn.Module, step: int) -> Iterator[StudentEngine | None]:
    """The engine for one run of a probe; it gives back what it took at the end, whatever happens.

    An engine on the same device (one with a true ``is_colocated``) also finds the memory free that torch has kept for
    the probe's tensors.

    Args:
        engine: The engine; None where the student's own model samples.
        student: The student, in evaluation mode.
        step: Number of the run.

    Examples:
        >>> with engine_of_run(None, nn.Linear(1, 1), 0) as own:
        ...     print(own)
        None
    """
    if engine is None:
        yield None
        return
    try:
        yield StudentEngine(engine, student, step)
    finally:
        engine.release()
        if getattr(engine, "is_colocated", False):
            torch.cuda.empty_cache()  # does nothing where no GPU is used
