"""Measures the rollouts that the training itself has sampled, by update gain."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from odp_callbacks.analysis.scalars import update_scalars
from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.missing_gains import inform_of_missing_gains
from odp_callbacks.callbacks.report_merging import merge_processes
from odp_callbacks.callbacks.reward_memory import RewardMemory
from odp_callbacks.callbacks.schedule import ProbeSchedule
from odp_callbacks.callbacks.shortage import inform_of_shortage
from odp_callbacks.callbacks.time_budget import TimeBudget, decide_together
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardError, RewardHost
from odp_callbacks.engine.training_rollouts import TrainingRollout, TrainingRollouts, as_training_rollouts
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.user_defaults import remembering_user_defaults
from odp_callbacks.records import ProbeReport

KIND = "update probe"
"""What the time budget calls such a measurement."""
MINIMUM_SECONDS = 1e-3
"""What is left for a measurement if reading the rollouts took all of its time."""


class TrainingUpdates:
    """Measures the update of the training's own rollouts, and logs it.

    Args:
        schedule: When to measure.
        failures: Decides what happens if a measurement fails.
        teachers: Names of the teachers.
        rewards: Scores rollouts that the training did not score.

    Attributes:
        probe: What measures; None without a student, and without ``update_every_n_steps``.
        is_due: Whether the next step with rollouts is measured. A training that reuses its rollouts has none from the
            present student at most steps, so a measurement that is due waits for some.
    """

    def __init__(
        self, schedule: ProbeSchedule, failures: FailureHandler, teachers: Iterable[str], rewards: RewardMemory
    ) -> None:
        self.schedule, self.failures, self.teachers, self.rewards = schedule, failures, tuple(teachers), rewards
        self.probe: Probe | None = None
        self.is_due = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the probe, which holds functions that cannot be pickled."""
        return {**self.__dict__, "probe": None}

    def prepare(self, full_probe: Probe, template: ChatTemplate, sampling: Mapping[str, Any]) -> None:
        """Make the probe, if there are measurements.

        Args:
            full_probe: The probe of the same student that also measures nodes.
            template: How the training renders messages.
            sampling: Options of a probe, as the training samples its rollouts.
        """
        if self.schedule.update_every_n_steps is None:
            return
        # The influences of tokens are not logged.
        without_nodes = replace(full_probe.config, budget=0, seconds=None, half_width=None, step_alignment=False)
        config = replace(without_nodes, influence=False, **sampling)
        self.probe = Probe(
            full_probe.student,
            full_probe.tokenizer,
            full_probe.reward,
            full_probe.teachers,
            config,
            training_template=template,
        )

    def measure(
        self,
        context: TrainerContext,
        training_rollouts: TrainingRollouts,
        time_budget: TimeBudget,
        next_seed: Callable[[], int],
    ) -> None:
        """Measure the update gain of the training's own rollouts, and log the result.

        It stays due if no process has rollouts.

        Args:
            context: The trainer.
            training_rollouts: Returns the training's own rollouts.
            time_budget: What measurements may take.
            next_seed: Returns the seed.
        """
        self.is_due = False
        limit = decide_together(context, time_budget, KIND)
        if not limit.has_time:
            return
        start_time = time.perf_counter()
        metrics = {f"odp/training/update_gain/{teacher}/all": float("nan") for teacher in self.teachers}
        with self.failures.guarded(
            context, "the update gain of the training's rollouts was not measured; training continues without it"
        ):
            seed = next_seed()
            report = merge_processes(
                context, self.failures, lambda: self._own_share(context, training_rollouts, seed, limit.seconds)
            )
            if report is None:
                self.is_due = True
                return
            metrics = update_scalars(report, self.schedule.confidence)
            inform_of_missing_gains(context, self.failures, report)
            inform_of_shortage(context, report, limit)
        time_budget.update_run_time()
        metrics["odp/training/seconds"] = time.perf_counter() - start_time
        time_budget.record_probe(KIND, metrics["odp/training/seconds"], limit.seconds)
        with self.failures.guarded(context, "failed to log the metrics of a probe"):
            context.log(metrics, None)

    def _own_share(
        self, context: TrainerContext, training_rollouts: TrainingRollouts, seed: int, seconds: float | None
    ) -> ProbeReport | None:
        """Measure the rollouts of this process, in so many seconds at most; None if it has none."""
        start_time = time.perf_counter()
        context.prepare()
        assert self.probe is not None
        self.probe.reward_host = RewardHost(context.trainer_state, context.step)
        # The responses to one row form one question, so that they are each other's baseline.
        rows: dict[int, Row] = {}
        responses: dict[int, list[Sequence[int]]] = {}
        rewards: dict[int, list[float | None]] = {}
        # A response without a token has no gradient.
        rollouts = [one for one in as_training_rollouts(training_rollouts()) if len(one.response_ids)]
        for rollout in self._scored(rollouts):
            rows[id(rollout.row)] = rollout.row
            responses.setdefault(id(rollout.row), []).append(rollout.response_ids)
            rewards.setdefault(id(rollout.row), []).append(rollout.reward)
        if not rows:
            return None
        question_ids = [f"{context.processes.rank}.{position}" for position in range(len(rows))]
        if seconds is not None:  # reading and scoring the rollouts took some of it
            seconds = max(MINIMUM_SECONDS, seconds - (time.perf_counter() - start_time))
        with remembering_user_defaults(), context.precision_context():
            return self.probe.run(
                list(rows.values()),
                seed=seed,
                ids=question_ids,
                responses=list(responses.values()),
                rewards=list(rewards.values()),
                seconds=seconds,
            )

    def _scored(self, rollouts: list[TrainingRollout]) -> list[TrainingRollout]:
        """The rollouts with their rewards, where steps are followed too and need the same rewards.

        If a row cannot be used, the probe scores the rollouts of the others.
        """
        assert self.probe is not None
        if self.schedule.step_gain_every_n_steps is None:
            return rollouts
        with remembering_user_defaults(), preserving_training_state():
            try:
                return self.rewards.scored(self.probe, rollouts)
            except RewardError:
                raise
            except ValueError:
                return rollouts
