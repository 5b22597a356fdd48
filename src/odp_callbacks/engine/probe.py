"""The probe: measures the alignment of teachers on a student's own rollouts."""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from odp_callbacks.analysis.time_shortage import time_shortage
from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.config import ProbeConfig, ProbeOptions, resolve_config
from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.engines.choice import as_engine
from odp_callbacks.engine.engines.student_engine import engine_of_run
from odp_callbacks.engine.gradients.gram_matrices import lora_modules
from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.engine.gradients.node_gradients import NodeDifferentiator
from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.measurement import Measurement
from odp_callbacks.engine.probe_design import design_probe, without_unplanned
from odp_callbacks.engine.prompts import DEFAULT_TEMPLATE, Question, QuestionLengthError, Row, text_tokenizer
from odp_callbacks.engine.question_encoding import QuestionEncoder, UsableQuestions, template_of
from odp_callbacks.engine.rewards import RewardError, RewardFunction, RewardHost, check_reward, score
from odp_callbacks.engine.rollouts import Rollout, end_tokens
from odp_callbacks.engine.rows import as_rows
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.sampling.vocabulary import check_logit_widths
from odp_callbacks.engine.student import check_student, other_trained_parameters, uncompiled
from odp_callbacks.engine.teachers import Teacher, as_teachers
from odp_callbacks.engine.timing import Progress, StageTimer
from odp_callbacks.engine.training_rollouts import TrainingRollout, as_scored_rollouts
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.unit_costs import UnitCosts
from odp_callbacks.engine.update.update_time import random_order
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.records import ProbeReport

LOGGER = logging.getLogger(__name__)


class Probe:
    """Measures on a student's own rollouts what each teacher is worth: update gain, and single tokens.

    It can be used alone, as a diagnosis without training; :func:`~odp_callbacks.diagnose` is the short form.

    Args:
        student: A causal language model with LoRA (peft).
        tokenizer: Its tokenizer, or a multimodal processor that holds it.
        reward: The verifier, a TRL reward function.
        teachers: A mapping from name to :class:`~odp_callbacks.engine.teachers.Teacher`, or anything else that
            :func:`~odp_callbacks.engine.teachers.as_teachers` accepts.
        config: How to measure; None for the defaults.
        training_template: How the training renders messages; ``config`` may say otherwise.
        **options: Fields of :class:`~odp_callbacks.engine.config.ProbeConfig`, which replace those of ``config``.

    Attributes:
        student: The student, without the wrapper of ``torch.compile``.
        tokenizer: Its tokenizer.
        reward: The verifier.
        teachers: The teachers by name.
        config: The configuration, with the options applied.
        modules: Names of the student's LoRA modules that are trained at present.
        eos_token_ids: Tokens that end a response.
        engine: Samples in place of the student's own model; None: that model does.
        summed_directions: For each teacher ``(P,)`` float32 on the CPU, its distillation gradient summed over the
            rollouts of the last run that measured the update; empty before. None (the default): not kept.

        unit_costs: What units of work took in earlier runs, by which a run with a limit of its seconds is planned.
        says_shortage: Whether a run that had to leave something out for lack of time says so in the log.
        student_in_place: Returns a context manager within which the student can run, where it is not always on its
            device.

    Raises:
        TypeError: If ``reward`` is not callable, or an option is unknown.
        ValueError: If the student is not adapted by LoRA alone (:func:`~odp_callbacks.engine.student.check_student`),
            a teacher cannot teach it, or an option is out of range.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        reward: RewardFunction,
        teachers: object,
        config: ProbeConfig | None = None,
        *,
        training_template: ChatTemplate = DEFAULT_TEMPLATE,
        **options: Unpack[ProbeOptions],
    ) -> None:
        check_reward(reward)
        self.config = resolve_config(config, options)
        self.engine, self._run_count = as_engine(self.config.engine), 0
        self.tokenizer = tokenizer = text_tokenizer(tokenizer)
        self.reward = reward
        self.teachers: dict[str, Teacher] = as_teachers(teachers)
        student = uncompiled(student)
        check_student(student)
        self.student = student
        self._other_parameters: set[str] = set()
        self._warn_of_other_parameters()
        self._verifier = Verifier(reward, self.config.reward_timeout, processes=self.config.reward_processes)
        self.eos_token_ids = end_tokens(student, tokenizer, self.config.eos_token_ids)
        direction = distillation_direction(
            self.config.divergence, self.config.beta, self.config.top_k, self.config.temperature
        )
        self._differentiator = NodeDifferentiator(student, self.teachers, self.config, direction)
        self._check_teachers()
        self._encoder = QuestionEncoder(
            self.student,
            self.tokenizer,
            self.teachers,
            reward,
            self.config.max_new_tokens,
            template_of(self.config, training_template),
        )
        self._has_warned_of_rows = False
        self.unit_costs = UnitCosts()
        self._earlier_report: ProbeReport | None = None
        self.says_shortage = True
        self.student_in_place: Callable[[], AbstractContextManager[None]] = nullcontext
        self.summed_directions: dict[str, Tensor] | None = None

    @property
    def reward_host(self) -> RewardHost:
        """What the reward function is passed besides prompts, completions and columns."""
        return self._verifier.host

    @reward_host.setter
    def reward_host(self, host: RewardHost) -> None:
        self._verifier.host = host

    def given_rollouts(self, rollouts: Sequence[TrainingRollout]) -> list[Rollout]:
        """Encode rollouts of the training for the student, and score those that have no reward."""
        template, end = self._encoder.template, self.eos_token_ids
        return as_scored_rollouts(rollouts, self.tokenizer, template, end, self._verifier)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the student's LoRA modules that are trained at present."""
        return tuple(lora_modules(list(lora_parameters(self.student))))

    def _warn_of_other_parameters(self) -> None:
        """Warn about parameters that the student trains and that are not measured, once about each set of them."""
        other_parameters = other_trained_parameters(self.student)
        if other_parameters.keys() <= self._other_parameters:
            return
        self._other_parameters |= other_parameters.keys()
        first_name = next(iter(other_parameters)).removeprefix("base_model.model.")
        warnings.warn(
            f"`student` also trains {sum(other_parameters.values()):,} parameters beside its LoRA parameters "
            f"({first_name}, …); alignment is measured on the latter.",
            stacklevel=3,
        )

    def _check_teachers(self) -> None:
        for teacher in self.teachers.values():
            teacher.check(self.student, self.tokenizer)

    def encode(self, rows: Sequence[Row] | Sequence[Question], ids: Sequence[str] | None = None) -> list[Question]:
        """Encode rows for the student and for every teacher, and check their lengths.

        Args:
            rows: Questions in TRL's convention. Questions that have been encoded already are returned as they are.
            ids: Identifies each question in the records; by default its ``id`` column, or its place.

        Returns:
            The questions, which :meth:`run` accepts in place of rows.

        Raises:
            ValueError: If a row has no prompt or is too long, or a teacher's template names a column that is missing.
        """
        usable = self._encoder.encode_usable(rows, ids)
        if usable.errors:
            raise usable.errors[0]
        return usable.questions

    def validate(self, rows: Sequence[Row], ids: Sequence[str] | None = None) -> list[Question]:
        """Check rows before any work: prompts, templates, lengths, and what the reward function takes and returns.

        Rows that are too long are left out with a warning, if there are others.

        Args:
            rows: Questions in TRL's convention, in any form that :func:`~odp_callbacks.engine.rows.as_rows` accepts.
            ids: Identifies each question in the records; by default its ``id`` column, or its place.

        Returns:
            The encoded questions, which :meth:`run` accepts in place of rows.

        Raises:
            ValueError: If a row has no prompt, every row is too long, a template or the reward function names a column
                that is missing, or the function returns the wrong number of rewards or one outside [0, 1]; if a model
                does not return logits over its vocabulary.
        """
        rows = as_rows(rows)
        if len(rows) == 0:
            raise ValueError("`prompts` has no rows; give at least one question.")
        questions = self._usable(rows, ids, QuestionLengthError).questions
        with self.student_in_place(), preserving_training_state(self.student):
            teacher_models = (getattr(teacher, "model", None) for teacher in self.teachers.values())
            check_logit_widths([self.student, *(model for model in teacher_models if isinstance(model, nn.Module))])
        with preserving_training_state():
            try:
                no_text, no_ids = [""] * len(questions[:2]), [()] * len(questions[:2])
                score(self.reward, questions[:2], no_text, no_ids, self.reward_host)
            except RewardError:
                raise
            except Exception as error:
                # Many verifiers never receive an empty response, so this one may still be sound.
                warnings.warn(f"`reward` raised {type(error).__name__} on an empty completion: {error}", stacklevel=2)
        return questions

    def run(
        self,
        rows: Sequence[Row] | Sequence[Question],
        *,
        seed: int = 0,
        ids: Sequence[str] | None = None,
        responses: Sequence[Sequence[Sequence[int]]] | None = None,
        rewards: Sequence[Sequence[float | None]] | None = None,
        seconds: float | None = None,
        progress: Progress | None = None,
        preconditioner: Preconditioner | None = None,
        journal: Journal | None = None,
    ) -> ProbeReport:
        """Measure on these rows.

        Weights, gradients, modes, adapters and random streams are afterwards as they were before.

        Args:
            rows: Questions in TRL's convention, or the questions that :meth:`validate` returned. Rows that cannot be
                used are left out with a warning and counted in the report, if there are others.
            seed: Seed of everything random in the probe.
            ids: Identifies each question in the records; by default its ``id`` column, or its place.
            responses: For each row, the student's own responses as token ids, if they have been sampled already (by
                the training, for example); None samples them.
            rewards: For each row, the rewards of these responses, if they have been scored already: any finite number,
                NaN for a response that shall not count, None where ``reward`` shall score it. None scores all.
            seconds: Number of seconds that this run may take; it lowers the ``seconds`` of the configuration.
            progress: Called with the stage's name, the amount done, and the total.
            preconditioner: A second geometry of the LoRA parameters to measure in, with the same nodes and
                continuations; it becomes the report's ``preconditioned``.
            journal: Stores continuations as they finish, and returns those of an interrupted probe with the same
                seed, rows and student.

        Raises:
            ValueError: If no row can be used, or a response cannot.
        """
        config = self.config
        if seconds is not None and config.seconds is not None:
            config = replace(config, seconds=min(seconds, config.seconds))
        deadline = Deadline(seconds if config.seconds is None else config.seconds)
        # Since the probe was made, adapters may have been merged, switched, deleted, frozen or unfrozen.
        check_student(self.student)
        self._check_teachers()
        self._warn_of_other_parameters()
        self._run_count += 1
        with (
            self.student_in_place(),
            preserving_training_state(self.student),
            closing(self._verifier),
            engine_of_run(self.engine, self.student, self._run_count) as engine,
        ):
            usable = self._usable(rows, ids, ValueError)
            questions = usable.questions
            design = design_probe(config, deadline.seconds, len(questions), self._earlier_report)
            if responses is None:
                chosen = random_order(len(questions), Randomness(seed))[: design.questions]
                questions = [questions[place] for place in sorted(chosen)]
            measurement = Measurement(
                student=self.student,
                tokenizer=self.tokenizer,
                config=design.config,
                differentiator=self._differentiator,
                verifier=self._verifier,
                eos_token_ids=self.eos_token_ids,
                modules=self.modules,
                seed=seed,
                timer=StageTimer(progress),
                journal=journal,
                preconditioner=preconditioner,
                summed_directions=self.summed_directions,
                deadline=deadline,
                costs=self.unit_costs,
                engine=engine,
            )
            if responses is not None and usable.errors:
                responses = [responses[place] for place in usable.places]
            if rewards is not None and usable.errors:
                rewards = [rewards[place] for place in usable.places]
            report = measurement.run(questions, responses, rewards)
        if config.has_open_numbers and config.measures_nodes:  # the next run may be planned by it
            self._earlier_report = replace(report, preconditioned=None)
        report = without_unplanned(report, len(usable.questions) - len(questions))
        if self.says_shortage and (sentence := time_shortage(report)):
            LOGGER.warning("odp-callbacks: %s", sentence)
        unused = report.left_out.get("questions", 0) + len(usable.errors)
        return replace(report, left_out={**report.left_out, "questions": unused})

    def _usable(
        self, rows: Sequence[Row] | Sequence[Question], ids: Sequence[str] | None, tolerated: type[ValueError]
    ) -> UsableQuestions:
        """Encode the rows that can be used, and warn once about others."""
        usable = self._encoder.encode_usable(rows, ids, tolerated)
        if usable.complaint and not self._has_warned_of_rows:
            self._has_warned_of_rows = True
            warnings.warn(usable.complaint, stacklevel=3)
        return usable
