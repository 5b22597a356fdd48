"""Probes a training run, whatever trainer it has: decides when to measure, and logs what was measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from odp_callbacks.analysis.scalars import free_scalars, scalars
from odp_callbacks.analysis.summaries import SPLITS
from odp_callbacks.callbacks.constant_reward import warn_of_constant_reward
from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.gate_learning import GateLearning
from odp_callbacks.callbacks.question_order import QuestionOrder
from odp_callbacks.callbacks.report_merging import merge_processes
from odp_callbacks.callbacks.schedule import ProbeSchedule
from odp_callbacks.callbacks.time_budget import TimeBudget
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.callbacks.training_rollouts import TrainingRollouts, measure_training_rollouts
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.adam import adam_preconditioner
from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.teachers import as_teachers
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import save

FULL_PROBE, FREE_PROBE = "probe", "free probe"
"""The kinds of probes, whose costs the time budget knows separately."""
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
    ) -> None:
        if not callable(reward):
            raise TypeError(f"`reward` must be a function of prompts, completions and columns, but got {reward!r}.")
        if prompts is not None and not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
            raise TypeError(f"`prompts` must be rows with `len` and indexing, or None, but got {prompts!r}.")
        self.teachers = as_teachers(teachers)
        self.prompts = prompts
        self.reward = reward
        self.schedule = schedule
        self.config = config
        self.last_report: ProbeReport | None = None
        self.probe: Probe | None = None
        self.free_probe: Probe | None = None
        self.random_stream = torch.Generator().manual_seed(schedule.seed)
        self.questions = QuestionOrder(prompts, schedule.questions_per_probe, self.random_stream)
        self.probe_count = 0
        # With -1, a validation at step 0 is not mistaken for one whose step was probed already.
        self.last_step = -1
        self.last_probe_step = -1
        self.gate_learning = GateLearning(gate)
        self.time_budget = TimeBudget(schedule.max_overhead)
        self.failures = FailureHandler(schedule.strict)

    def prepare(
        self,
        student: nn.Module,
        tokenizer: Any,
        training_gate: object | None = None,
        distilled_teachers: Sequence[str] = (),
    ) -> None:
        """Check everything that can be checked before training.

        Args:
            student: A peft model.
            tokenizer: The student's tokenizer.
            training_gate: The gate that acts on the loss, if there is one.
            distilled_teachers: Names of the teachers that the training distils from, where they are known.

        Raises:
            ValueError: If something that was given cannot work.
        """
        self.gate_learning.use_gate_of_training(training_gate, distilled_teachers, self.teachers)
        if self.probe is not None and self.probe.student is student:
            return
        self.probe = Probe(student, tokenizer, self.reward, self.teachers, self.config)
        if self.schedule.free_every_n_steps is not None:
            free_config = replace(self.config, budget=0, time_budget=None, half_width=None, step_alignment=False)
            self.free_probe = Probe(student, tokenizer, self.reward, self.teachers, free_config)
        if self.prompts is not None:
            # The checked rows are spread evenly over the dataset; a probe checks its own rows again.
            stride = max(1, len(self.prompts) // ROWS_CHECKED)
            self.probe.validate([self.prompts[index] for index in range(0, len(self.prompts), stride)])

    def on_train_start(self, context: TrainerContext) -> None:
        """Start the clock, and probe if that is due at the start.

        Raises:
            ValueError: If ``optimizer_geometry`` is on and the geometry of an optimizer is not known.
        """
        self._preconditioner(context)
        self.time_budget.start()
        self._update_teachers(context.step)
        # A step before the last one seen means that this monitor now watches another run.
        if self.last_step < 0 or context.step < self.last_step:
            self.last_step = context.step
            if self.schedule.at_start and self.prompts is not None:
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
            training_rollouts: Returns the training's own rollouts, for the free mode.
            probe_is_due: A function of the step and the last step seen, used in place of the schedule's.
        """
        if context.step == self.last_step:  # gradients are still being accumulated
            return
        self._update_teachers(context.step)
        run_full_probe = (probe_is_due or self.schedule.probe_is_due)(context.step, self.last_step)
        run_free_probe = self.schedule.free_probe_is_due(context.step, self.last_step)
        self.last_step = context.step
        if run_full_probe:
            self.run_probe(context, batch)
        if run_free_probe and training_rollouts is not None:
            self.run_free_probe(context, training_rollouts)

    def on_validation_end(self, context: TrainerContext) -> None:
        """Probe at the end of a validation, unless this step was probed already."""
        if not self.schedule.on_validation or self.last_probe_step == context.step:
            return
        if self.prompts is None:
            self.failures.warn_once(
                context, "`on_validation` needs `prompts`, because validation has no training batch; skipped the probe."
            )
            return
        self.run_probe(context)

    def on_train_end(self) -> None:
        """Stop the clock."""
        self.time_budget.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue where this one stopped."""
        state = {
            "probe_count": self.probe_count,
            "last_step": self.last_step,
            "last_probe_step": self.last_probe_step,
            "remaining_questions": list(self.questions.remaining),
            "random_stream": self.random_stream.get_state(),
            "time_budget": self.time_budget.state_dict(),
            "teachers": {teacher_name: teacher.state_dict() for teacher_name, teacher in self.teachers.items()},
        }
        gate_state = self.gate_learning.state_dict()
        return state if gate_state is None else {**state, "gate": gate_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the run that saved it."""
        self.probe_count = state_dict["probe_count"]
        self.last_step = state_dict["last_step"]
        self.last_probe_step = state_dict["last_probe_step"]
        self.questions.remaining = list(state_dict["remaining_questions"])
        self.random_stream.set_state(state_dict["random_stream"])
        self.time_budget.load_state_dict(state_dict["time_budget"])
        for teacher_name, teacher_state in state_dict["teachers"].items():
            self.teachers[teacher_name].load_state_dict(teacher_state)
        self.gate_learning.load_state_dict(state_dict.get("gate"))

    def run_probe(self, context: TrainerContext, batch: Any = None) -> None:
        """Run one probe: measure, let the gate learn, log and save.

        A failure is reported by a warning, unless ``strict``; the metrics of a failed probe are NaN.

        Args:
            context: The trainer.
            batch: The batch, whose rows are the questions where there are no ``prompts``.
        """
        has_time, time_limit = self._decide(context, FULL_PROBE)
        if not has_time:
            return
        start_time = time.perf_counter()
        self.probe_count += 1
        self.last_probe_step = context.step
        report: ProbeReport | None = None
        metrics = {
            f"odp/alignment/{teacher_name}/{split}": float("nan") for teacher_name in self.teachers for split in SPLITS
        }
        with self.failures.guarded(context, "a probe failed; training continues without it"):
            measured = self._measure(context, batch, time_limit)
            metrics = scalars(measured, self.schedule.confidence)
            report = measured
        if report is not None:
            with self.failures.guarded(context, "`gate` failed to learn from a probe"):
                metrics |= self.gate_learning.observe(report)
        self.time_budget.update_run_time()
        self.time_budget.record_probe(
            FULL_PROBE,
            time.perf_counter() - start_time,
            0.0 if report is None else report.stage_seconds.get("continuations", 0.0),
            shortened=time_limit is not None,
        )
        metrics["odp/probe/time_share"] = self.time_budget.time_share
        metrics["odp/probe/left_out"] = float(self.time_budget.skipped_probes)
        self._publish(context, metrics, report)
        if report is not None:
            self.last_report = report

    def run_free_probe(self, context: TrainerContext, training_rollouts: TrainingRollouts) -> None:
        """Measure the training's own rollouts in the free mode, and log the result.

        Args:
            context: The trainer.
            training_rollouts: Returns the training's own rollouts.
        """
        has_time, _ = self._decide(context, FREE_PROBE)
        if not has_time:
            return
        start_time = time.perf_counter()
        metrics = {f"odp/free/predicted_gain/{teacher_name}": float("nan") for teacher_name in self.teachers}
        with self.failures.guarded(context, "a probe in the free mode failed; training continues without it"):
            assert self.free_probe is not None
            measure = partial(measure_training_rollouts, self.free_probe, training_rollouts, context, self._next_seed())
            report = merge_processes(context, self.failures, measure)
            if report is None:
                return
            metrics = free_scalars(report, self.schedule.confidence)
        self.time_budget.update_run_time()
        metrics["odp/free/seconds"] = time.perf_counter() - start_time
        self.time_budget.record_probe(FREE_PROBE, metrics["odp/free/seconds"])
        with self.failures.guarded(context, "failed to log the metrics of a probe"):
            context.log(metrics, None)

    def _decide(self, context: TrainerContext, kind: str) -> tuple[bool, float | None]:
        """Whether ``max_overhead`` leaves time for a probe; all processes follow the decision of the first one."""
        self.time_budget.update_run_time()
        skipped_before = self.time_budget.skipped_probes
        decision = self.time_budget.decide(kind, can_be_shortened=self.config.adaptive and kind == FULL_PROBE)
        has_time, time_limit = context.processes.broadcast(decision)
        if not has_time and skipped_before == 0:
            last_cost = self.time_budget.costs[kind].seconds
            context.inform(
                f"odp-callbacks: skipped the {kind} at step {context.step}: the last one took {last_cost:.1f} s, and "
                f"another one would exceed `max_overhead` = {self.time_budget.max_share} of the training time "
                f"({self.time_budget.time_share:.2f} so far). Later probes may be skipped, too; "
                "`odp/probe/left_out` counts them."
            )
        return has_time, time_limit

    def _measure(self, context: TrainerContext, batch: Any, time_limit: float | None) -> ProbeReport:
        """Measure the next questions, in all processes together."""
        assert self.probe is not None
        probe = self.probe
        seed = self._next_seed()

        def measure_own_share() -> ProbeReport | None:
            question_ids, rows = self.questions.next_questions(context.processes, batch, self.last_probe_step)
            if not rows:
                return None
            last_seconds = {} if self.last_report is None else self.last_report.stage_seconds
            with context.precision_context(), context.progress(last_seconds) as progress:
                return probe.run(
                    rows,
                    seed=seed,
                    ids=question_ids,
                    time_budget=time_limit,
                    progress=progress,
                    preconditioner=self._preconditioner(context),
                )

        report = merge_processes(context, self.failures, measure_own_share)
        assert report is not None, "a probe has questions"
        warn_of_constant_reward(context, self.failures, report)
        return report

    def _publish(self, context: TrainerContext, metrics: dict[str, float], report: ProbeReport | None) -> None:
        """Log a probe and save its records; this counts as the probe's time."""
        start_time = time.perf_counter()
        with self.failures.guarded(context, "failed to log the metrics of a probe"):
            context.log(metrics, report)
        folder = self.schedule.records_folder
        if report is not None and folder is not None and context.is_global_zero:
            with self.failures.guarded(context, "failed to save the records of a probe"):
                save(report, folder / f"step-{context.step:08d}", overwrite=True)
        self.time_budget.extend_last_probe(FULL_PROBE, time.perf_counter() - start_time)

    def _preconditioner(self, context: TrainerContext) -> Preconditioner | None:
        """The geometry of the optimizer's next step, if it is asked for and the optimizer has taken a step."""
        assert self.probe is not None
        if not self.schedule.optimizer_geometry:
            return None
        return adam_preconditioner(context.optimizers, self.probe.student)

    def _next_seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.random_stream))

    def _update_teachers(self, step: int) -> None:
        assert self.probe is not None
        for teacher in self.teachers.values():
            teacher.update(self.probe.student, step)
