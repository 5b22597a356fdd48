"""The probe that follows the protocol of arXiv:2605.10889."""

import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import nn

from odp_callbacks.analysis.paper.records import PaperRecord
from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.engines.choice import as_engine
from odp_callbacks.engine.engines.student_engine import engine_of_run
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.paper.config import PaperConfig, resolve_paper_config
from odp_callbacks.engine.paper.measurement import PaperMeasurement
from odp_callbacks.engine.prompts import DEFAULT_TEMPLATE, Question, Row, text_tokenizer
from odp_callbacks.engine.question_encoding import QuestionEncoder, template_of
from odp_callbacks.engine.rewards import RewardFunction, check_reward
from odp_callbacks.engine.rollouts import end_tokens
from odp_callbacks.engine.student import uncompiled
from odp_callbacks.engine.teachers import Teacher, as_teachers
from odp_callbacks.engine.timing import Progress, StageTimer
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.verifier import Verifier


class PaperProbe:
    """Scores teachers by the protocol of arXiv:2605.10889: a cosine on the logits of visited tokens.

    Use it to compare with the paper. It needs far more rollouts than :class:`~odp_callbacks.engine.Probe` (the paper's:
    45,000 to 200,000 for each question), its tokens are ranked and not drawn, and two biases of it are described in
    :mod:`odp_callbacks.analysis.paper.biases`. It takes no gradient of a parameter, so that the student needs no LoRA.

    The paper calls KL(student‖teacher) "forward KL"; everybody else, and this package, calls it *reverse* KL.

    Args:
        student: A causal language model, with or without LoRA.
        tokenizer: Its tokenizer, or a multimodal processor that holds it.
        reward: The verifier, a TRL reward function.
        teachers: Teachers by name, or anything else that :func:`~odp_callbacks.engine.teachers.as_teachers` accepts.
            One tree serves all of them: each costs one forward pass over the paths, and the tokens that it proposes.
        config: The options; None for the paper's values.
        training_template: How messages are rendered; ``config`` may say otherwise.
        **options: Fields of :class:`~odp_callbacks.engine.paper.PaperConfig`, which replace those of ``config``.

    Raises:
        TypeError: If ``reward`` is not callable, or an option is unknown.
        ValueError: If a teacher cannot teach the student, or an option is out of range.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        reward: RewardFunction,
        teachers: object,
        config: PaperConfig | None = None,
        *,
        training_template: ChatTemplate = DEFAULT_TEMPLATE,
        **options: Any,
    ) -> None:
        check_reward(reward)
        self.config = resolve_paper_config(config, options)
        self.tokenizer = tokenizer = text_tokenizer(tokenizer)
        self.student = student = uncompiled(student)
        self.teachers: dict[str, Teacher] = as_teachers(teachers)
        for teacher in self.teachers.values():
            teacher.check(student, tokenizer)
        self._engine, self._run_count = as_engine(self.config.engine), 0
        self.eos_token_ids = end_tokens(student, tokenizer, self.config.eos_token_ids)
        self._verifier = Verifier(reward, self.config.reward_timeout, processes=self.config.reward_processes)
        self._encoder = QuestionEncoder(
            student,
            tokenizer,
            self.teachers,
            reward,
            self.config.max_new_tokens,
            template_of(self.config.shared, training_template),
        )

    def run(
        self,
        rows: Sequence[Row] | Sequence[Question],
        *,
        seed: int = 0,
        ids: Sequence[str] | None = None,
        progress: Progress | None = None,
        journal: Journal | None = None,
    ) -> PaperRecord:
        """Measure on these rows.

        Weights, modes, adapters and random streams are afterwards as they were before.

        Args:
            rows: Questions in TRL's convention. Rows that cannot be used are left out with a warning, if there are
                others; so are questions that no rollout solves, as in the paper.
            seed: Seed of everything random.
            ids: Identifies each question in the record; by default its ``id`` column, or its place.
            progress: Called with the stage's name, the amount done, and the total.
            journal: Stores rollouts as they finish, and returns those of an interrupted measurement with the same seed,
                rows and student.

        Raises:
            EngineError: If the engine does not sample from the student.
            ValueError: If no row can be used.
        """
        self._run_count += 1
        with (
            preserving_training_state(self.student),
            closing(self._verifier),
            engine_of_run(self._engine, self.student, self._run_count) as engine,
        ):
            usable = self._encoder.encode_usable(rows, ids, ValueError)
            if usable.complaint:
                warnings.warn(usable.complaint, stacklevel=2)
            record = PaperMeasurement(
                self.student,
                self.tokenizer,
                self.teachers,
                self.config,
                self._verifier,
                self.eos_token_ids,
                seed,
                StageTimer(progress),
                journal,
                engine,
            ).run(usable.questions)
        unusable = {"unusable row": len(usable.errors)} if usable.errors else {}
        return replace(record, left_out={**record.left_out, **unusable})
