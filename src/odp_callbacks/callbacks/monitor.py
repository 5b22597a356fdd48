"""Probes a training run, whatever trainer it has: decides when to measure, and logs what was measured."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from odp_callbacks.analysis.run_curve import RUN_CURVE, curve_setting
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.analysis.summaries import SPLITS
from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.gate_learning import GateLearning
from odp_callbacks.callbacks.pooled_updates import PooledUpdates
from odp_callbacks.callbacks.question_measurement import measure_questions
from odp_callbacks.callbacks.question_order import QuestionOrder
from odp_callbacks.callbacks.reward_memory import RewardMemory
from odp_callbacks.callbacks.run_records import RunRecords
from odp_callbacks.callbacks.saved_state import monitor_state, restore_monitor, restore_teachers_alone
from odp_callbacks.callbacks.schedule import ProbeSchedule
from odp_callbacks.callbacks.step_gain import StepGain
from odp_callbacks.callbacks.student_replica import ReplicaLoader, WholeStudent
from odp_callbacks.callbacks.teacher_updates import update_teachers
from odp_callbacks.callbacks.time_budget import TimeBudget, decide_together
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.callbacks.training_updates import TrainingUpdates
from odp_callbacks.callbacks.unprobed_run import RunWatch
from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.adam import adam_preconditioner
from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import DEFAULT_TEMPLATE, Row
from odp_callbacks.engine.rewards import RewardFunction, check_reward
from odp_callbacks.engine.rows import as_rows
from odp_callbacks.engine.teachers import as_teachers
from odp_callbacks.engine.training_rollouts import TrainingRollouts, read_once
from odp_callbacks.records import ProbeReport

FULL_PROBE = "probe"
"""What the time budget calls a probe."""
ROWS_CHECKED = 1000
"""About how many rows of a large dataset are checked before training."""


class Monitor:
    """Probes a training run; a trainer's callback calls it at every event of the training.

    Args:
        teachers: As in :class:`~odp_callbacks.GradientAlignmentCallback`.
        prompts: The questions; None for the rows of the current training batch.
        reward: The TRL reward function.
        schedule: When to probe.
        config: How a probe measures.
        gate: A gate that learns from the probes; None for the gate of the training.
        student_replica: Loads a sharded student unsharded; None copies it from the shards.

    Attributes:
        last_report: The report of the last probe that succeeded; None before any.
        probe_count: How many probes were started.
        last_step: The optimizer step seen last; -1 before any.
        last_probe_step: The optimizer step of the last probe; -1 before any.

    Raises:
        TypeError: If ``reward`` is not callable, or ``prompts`` cannot be indexed.
        ValueError: If the teachers cannot be used.
    """

    def __init__(
        self,
        teachers: object,
        prompts: Sequence[Row] | None,
        reward: RewardFunction,
        *,
        schedule: ProbeSchedule,
        config: ProbeConfig,
        gate: object | None = None,
        student_replica: ReplicaLoader | None = None,
    ) -> None:
        check_reward(reward)
        prompts = None if prompts is None else as_rows(prompts)
        self.teachers = as_teachers(teachers)
        self.prompts = prompts
        self.reward = reward
        self.schedule = schedule
        self.config = config
        self.last_report: ProbeReport | None = None
        self.probe: Probe | None = None
        self.whole_student = WholeStudent(student_replica)
        self.random_stream = torch.Generator().manual_seed(schedule.seed)
        self.questions = QuestionOrder(prompts, schedule.questions_per_probe, schedule.seed)
        self.probe_count = 0
        # With -1, a validation at step 0 is not mistaken for one whose step was probed already.
        self.last_step = -1
        self.last_probe_step = -1
        self.gate_learning = GateLearning(gate)
        self.time_budget = TimeBudget(schedule.max_overhead)
        self.failures = FailureHandler(schedule.strict)
        self.run_records = RunRecords(schedule.records_folder)
        self.pooled_updates = PooledUpdates(schedule.pooled_decay, schedule.confidence)
        self.rewards = RewardMemory()
        self.training_updates = TrainingUpdates(schedule, self.failures, self.teachers, self.rewards)
        scores_rollouts = schedule.update_every_n_steps is not None
        self.step_gain = StepGain(schedule.confidence, self.failures, self.rewards, scores_rollouts=scores_rollouts)
        self._dropped_states: list[str] = []
        self._run_watch = RunWatch()
        self._student_is_new = self._was_restored = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the probe, which holds functions that cannot be pickled; :meth:`prepare` makes it again."""
        return {**self.__dict__, "probe": None}

    def prepare(
        self,
        student: nn.Module,
        tokenizer: Any,
        training_gate: object | None = None,
        distilled_teachers: Sequence[str] = (),
        template: ChatTemplate = DEFAULT_TEMPLATE,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        """Check everything that can be checked before training.

        Args:
            student: A peft model.
            tokenizer: The student's tokenizer.
            training_gate: The gate that acts on the loss, if there is one.
            distilled_teachers: Names of the teachers that the training distils from, where they are known.
            template: How the training renders messages.
            sampling: Options of a probe, as the training samples its own rollouts; None for the probe's own.

        Raises:
            ValueError: If something that was given cannot work.
        """
        self.gate_learning.use_gate_of_training(training_gate, distilled_teachers, self.teachers)
        student = self.whole_student.of(student)
        if self.probe is not None and self.probe.student is student:
            return
        self.forget_student()
        self._student_is_new = True
        with self.whole_student.in_use():
            self._make_probes(student, tokenizer, template, sampling or {})

    def _make_probes(
        self, student: nn.Module, tokenizer: Any, template: ChatTemplate, sampling: Mapping[str, Any]
    ) -> None:
        self.probe = Probe(student, tokenizer, self.reward, self.teachers, self.config, training_template=template)
        self.training_updates.prepare(self.probe, template, sampling)
        for probe in filter(None, (self.probe, self.training_updates.probe)):
            probe.says_shortage = False  # the callback does, of all processes together
            probe.student_in_place = self.whole_student.in_use
        if self.schedule.step_gain_every_n_steps is not None:
            for probe in filter(None, (self.probe, self.training_updates.probe)):
                probe.summed_directions = self.step_gain.directions
        if self.prompts is not None:
            # The checked rows are spread evenly over the dataset; a probe checks its own rows again.
            stride = max(1, len(self.prompts) // ROWS_CHECKED)
            self.probe.validate([self.prompts[index] for index in range(0, len(self.prompts), stride)])

    def forget_student(self) -> None:
        """Drop what belongs to the student that was measured so far: it is there no more."""
        self.probe = self.training_updates.probe = self.last_report = None
        self.step_gain.forget_student()

    def is_new_run(self, step: int) -> bool:
        """Whether a training that starts at this step is another one than that seen last, and was not resumed."""
        if self.last_step < 0 or step < self.last_step:
            return True
        return not self._was_restored and (step == 0 or self._student_is_new)

    def on_train_start(self, context: TrainerContext) -> None:
        """Start the clock, and probe if that is due at the start.

        Raises:
            ValueError: If ``optimizer_geometry`` is on and the geometry of an optimizer is not known, or if nothing can
                be saved in ``records``.
        """
        is_new_run = self.is_new_run(context.step)
        self.run_records.start(context, self.failures, is_new_run=is_new_run and self.last_step >= 0)
        if is_new_run:
            self.last_step, self.last_probe_step, self.training_updates.is_due = context.step, -1, False
            self.time_budget = TimeBudget(self.schedule.max_overhead, first_step=context.step)
            self.pooled_updates.clear()
            self.failures.forget_warnings()
        was_restored = self._was_restored
        self._student_is_new = self._was_restored = False
        self._run_watch = RunWatch(context.step)
        self._warn_of_dropped_states(context)
        self.preconditioner(context)
        self.time_budget.start()
        self._follow_student(context)
        if was_restored:
            self.whole_student.gather_base()
        self.step_gain.start(context, self._followed_student, is_new_run)
        if is_new_run and self.schedule.at_start and self.prompts is not None:
            self.run_probe(context)

    def on_batch_end(
        self,
        context: TrainerContext,
        batch: Any = None,
        training_rollouts: TrainingRollouts | None = None,
        probe_is_due: Callable[[int, int], bool] | None = None,
    ) -> None:
        """Probe if the batch ended with an optimizer step after which a probe is due.

        Args:
            context: The trainer.
            batch: The batch, whose rows are the questions where there are no ``prompts``.
            training_rollouts: Returns the training's own rollouts, whose update is measured.
            probe_is_due: A function of the step and the last step seen, used in place of the schedule's.
        """
        self._run_watch.batches += 1
        training_rollouts = None if training_rollouts is None else read_once(training_rollouts)
        if training_rollouts is not None and self._followed_student is not None:
            self.step_gain.collect(context, training_rollouts)
        if context.step == self.last_step:  # gradients are still being accumulated
            return
        self._follow_student(context)
        run_full_probe: bool | None = None
        with self.failures.guarded(context, "`should_probe` failed; the step is not probed"):
            run_full_probe = bool((probe_is_due or self.schedule.probe_is_due)(context.step, self.last_step))
        self._run_watch.probed |= run_full_probe is None  # there was a warning already
        self.training_updates.is_due |= self.schedule.update_is_due(context.step, self.last_step)
        step_gain_is_due = self.schedule.step_gain_is_due(context.step, self.last_step)
        self.last_step = context.step
        if run_full_probe:
            self.run_probe(context, batch)
        if self.training_updates.is_due and training_rollouts is not None:
            self._run_watch.probed = True
            self.training_updates.measure(context, training_rollouts, self.time_budget, self.next_seed)
        if self.schedule.step_gain_every_n_steps is not None:
            self.step_gain.log_step(context, self.probe, self.time_budget, is_due=step_gain_is_due)
        self.rewards.clear()

    def on_validation_end(self, context: TrainerContext) -> None:
        """Probe at the end of a validation, unless this step of the training was probed already.

        A validation outside a training may be that of another model or checkpoint; it is always probed.
        """
        was_probed = context.is_training and self.last_probe_step == context.step
        if not self.schedule.on_validation or was_probed:
            return
        if self.prompts is None:
            self.failures.warn_once(
                context, "`on_validation` needs `prompts`, because validation has no training batch; skipped the probe."
            )
            return
        with self.failures.guarded(context, "the sharded student was not gathered"):
            self.whole_student.synchronize()
        self.run_probe(context)

    def on_train_end(self, context: TrainerContext) -> None:
        """Stop the clock, and warn about a run without a probe."""
        self.time_budget.stop()
        if complaint := self._run_watch.complaint(context.step, self.schedule.every_n_steps):
            self.failures.warn_once(context, complaint)

    def on_exception(self) -> None:
        """Stop the clock of a run that failed."""
        self.time_budget.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue where this one stopped."""
        return monitor_state(self)

    def load_state_dict(self, state_dict: Any, *, continues_run: bool = True) -> None:
        """Restore the state of the run that saved it; the next event warns about what does not fit and was dropped.

        Args:
            state_dict: What :meth:`state_dict` returned; a file may hold something else.
            continues_run: Whether that run is continued. Where its checkpoint is only validated, the teachers alone
                are restored.
        """
        self._was_restored |= continues_run
        restore = restore_monitor if continues_run else restore_teachers_alone
        self._dropped_states += restore(self, state_dict)

    def _warn_of_dropped_states(self, context: TrainerContext) -> None:
        """Warn about the parts of a checkpoint that did not fit."""
        sentences = [*self._dropped_states, *self.gate_learning.dropped_states()]
        self._dropped_states = []
        for sentence in sentences:
            self.failures.warn_once(context, sentence)

    def run_probe(self, context: TrainerContext, batch: Any = None) -> None:
        """Run one probe: measure, let the gate learn, log and save.

        A failure is reported by a warning, unless ``strict``; the metrics of a failed probe are NaN.

        Args:
            context: The trainer.
            batch: The batch, whose rows are the questions where there are no ``prompts``.
        """
        self._run_watch.probed = True
        self._warn_of_dropped_states(context)
        limit = decide_together(context, self.time_budget, FULL_PROBE)
        if not limit.has_time:
            return
        start_time = time.perf_counter()
        self.probe_count += 1
        if context.is_training:
            self.last_probe_step = context.step
        report: ProbeReport | None = None
        figures = ["update_gain"] * self.config.update + ["alignment"] * self.config.measures_nodes
        metrics = {"/".join(["odp", *parts]): float("nan") for parts in product(figures, self.teachers, SPLITS)}
        with self.failures.guarded(context, "a probe failed; training continues without it"):
            measured = measure_questions(self, context, batch, limit)
            metrics = scalars(measured, self.schedule.confidence)
            report = replace(measured, settings={**measured.settings, "confidence": self.schedule.confidence})
        if report is not None:
            with self.failures.guarded(context, "update gain was not pooled over the probes"):
                metrics |= self.pooled_updates.observe(report)
            with self.failures.guarded(context, "`gate` failed to learn from a probe"):
                metrics |= self.gate_learning.observe(report)
        if context.is_training:
            self.time_budget.update_run_time()
            self.time_budget.record_probe(
                FULL_PROBE,
                time.perf_counter() - start_time,
                limit.seconds,
            )
        metrics["odp/probe/time_share"] = self.time_budget.time_share
        metrics["odp/probe/left_out"] = float(self.time_budget.skipped_probes)
        self._publish(context, metrics, report)
        if report is not None:
            self.last_report = report

    @property
    def _followed_student(self) -> nn.Module | None:
        """The student, if its steps are followed."""
        is_followed = self.schedule.step_gain_every_n_steps is not None
        return self.probe.student if self.probe is not None and is_followed else None

    def _publish(self, context: TrainerContext, metrics: dict[str, float], report: ProbeReport | None) -> None:
        """Log a probe and save its records; this counts as the probe's time."""
        start_time = time.perf_counter()
        with self.failures.guarded(context, "failed to log the metrics of a probe"):
            context.log(metrics, report)
        if report is not None and context.is_global_zero:
            with self.failures.guarded(context, "failed to save the records of a probe"):
                curve = curve_setting(context.step, self.step_gain.take_points())
                report = replace(report, settings={**report.settings, RUN_CURVE: curve})
                self.run_records.save(report, context.step, overwrite=context.is_training)
        if context.is_training:
            self.time_budget.extend_last_probe(FULL_PROBE, time.perf_counter() - start_time)

    def preconditioner(self, context: TrainerContext) -> Preconditioner | None:
        """The geometry of the optimizer's next step, if it is asked for and the optimizer has taken a step."""
        if not self.schedule.optimizer_geometry:
            return None
        assert self.probe is not None
        if self.whole_student.is_replica:
            raise ValueError(
                "`optimizer_geometry` was asked for, but the student is sharded, and so are the second moments of its "
                "optimizer; leave it off, or train with DDP."
            )
        return adam_preconditioner(context.optimizers, self.probe.student)

    def next_seed(self) -> int:
        """The seed of the next measurement."""
        return int(torch.randint(2**62, (), generator=self.random_stream))

    def _follow_student(self, context: TrainerContext) -> None:
        """Find the student as it is now, and let the teachers follow it; a probe warns if there is none any more."""
        try:
            context.prepare()
            self.whole_student.synchronize()
        except Exception:
            self.forget_student()
            if self.schedule.strict:
                raise
        if self.probe is not None:
            update_teachers(self.teachers, self.probe.student, context, self.failures)
