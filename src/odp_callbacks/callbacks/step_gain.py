"""The step that training took: what it was expected to gain, and whether it points where the teachers do.

Rollouts that the training samples after a step are of new questions. Their log-probabilities under the parameters after
the step are what the training has; those under the parameters before it take one forward pass.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from odp_callbacks.callbacks.batch_gains import BatchGains
from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.reward_memory import RewardMemory
from odp_callbacks.callbacks.step_curves import StepCurves
from odp_callbacks.callbacks.time_budget import TimeBudget
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.training_rollouts import TrainingRollout, TrainingRollouts, as_training_rollouts
from odp_callbacks.engine.update.taken_step import KeptParameters, step_cosines

KIND = "step gain"
"""What the time budget calls a measurement of a step."""
SHARE = 0.5
"""Steps may take this share of what ``max_overhead`` allows; the rest is for probes, which come more seldom."""
MAXIMUM_POINTS = 2000
"""Points of the curves that are kept for the record of the next probe; beyond it, every second one is dropped."""
NOT_MEASURED = "the step that training took was not measured; training continues without it"
"""What it means that a measurement failed."""


class Readiness(NamedTuple):
    """What the processes tell each other before they measure a step.

    Attributes:
        knows_step: Whether there is a copy of the same parameters from before the step.
        shows_rollouts: Whether the training showed rollouts of its own.
        has_time: Whether ``max_overhead`` leaves time.
    """

    knows_step: bool
    shows_rollouts: bool
    has_time: bool


class StepGain:
    """Follows the steps of a training.

    Args:
        confidence: Level of the interval of the summed gain.
        failures: Decides what happens if a measurement fails.
        rewards: Scores rollouts that the training did not score.
        scores_rollouts: Whether the callback's ``reward`` scores rollouts that the training did not score; otherwise
            they are left out.

    Attributes:
        curves: The expected gain and the realised change of the reward.
        directions: Summed distillation gradient of each teacher ``(P,)``, from the last measurement of an update.
        seconds: What the measurements have taken.
        points: The figures of the steps since the last record of a probe, each with its ``"step"``.
    """

    def __init__(
        self, confidence: float, failures: FailureHandler, rewards: RewardMemory, *, scores_rollouts: bool
    ) -> None:
        self.confidence, self.failures, self.rewards = confidence, failures, rewards
        self.scores_rollouts = scores_rollouts
        self.curves = StepCurves()
        self.directions: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.points: list[dict[str, float]] = []
        self._rollouts: list[TrainingRollout] = []
        self._last_batch: list[TrainingRollout] = []
        self._shows_rollouts = False
        self.forget_student()

    def forget_student(self) -> None:
        """Drop what belongs to the student that was followed so far."""
        self.directions = {}
        self._reference: KeptParameters | None = None  # where the last gain ended; None before the first batch
        self._sampled: KeptParameters | None = None  # where the present batch was sampled
        self._batch_gains = BatchGains(self.failures, self.rewards)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the student, and cannot be pickled."""
        empty: dict[str, Any] = {
            "directions": {},
            "_reference": None,
            "_sampled": None,
            "_batch_gains": BatchGains(self.failures, self.rewards),
        }
        return {**self.__dict__, **empty, "_rollouts": [], "_last_batch": []}

    def start(self, context: TrainerContext, student: nn.Module | None, is_new_run: bool) -> None:
        """Begin a run, or go on with one; the first gain is that of the first step from here.

        Args:
            context: The trainer.
            student: The student; None if there is none yet.
            is_new_run: Whether the curves start anew.
        """
        if is_new_run:
            self.curves, self.seconds, self.points = StepCurves(), 0.0, []
            self.directions.clear()  # the probes fill this dictionary
        self._rollouts, self._last_batch = [], []
        self._reference, self._batch_gains = None, BatchGains(self.failures, self.rewards)
        self._sampled = None  # if copying fails, that of an earlier run must not stay
        with self.failures.guarded(context, NOT_MEASURED):
            self._sampled = None if student is None else KeptParameters.of(student, context.step)

    def collect(self, context: TrainerContext, training_rollouts: TrainingRollouts) -> None:
        """Take the rollouts of a batch; several batches can come before an optimizer step.

        Those of an earlier batch, which a module did not replace, say nothing new: a rollout that counted twice would
        be its own baseline.
        """
        self._shows_rollouts = True
        batch: list[TrainingRollout] = []
        with self.failures.guarded(context, NOT_MEASURED):
            batch = as_training_rollouts(training_rollouts())
        last_batch, self._last_batch = self._last_batch, batch
        if not _are_same(batch, last_batch):
            self._rollouts += [
                rollout
                for rollout in batch
                if len(rollout.response_ids) and (self.scores_rollouts or rollout.reward is not None)
            ]

    def log_step(self, context: TrainerContext, probe: Probe | None, time_budget: TimeBudget, *, is_due: bool) -> None:
        """Follow an optimizer step as :meth:`follow` does, and log the figures; a failure is warned about."""
        with self.failures.guarded(context, NOT_MEASURED):
            if metrics := self.follow(context, probe, time_budget, is_due=is_due):
                context.log(metrics, None)

    def follow(
        self, context: TrainerContext, probe: Probe | None, time_budget: TimeBudget, *, is_due: bool
    ) -> dict[str, float]:
        """Follow an optimizer step; all processes must call it, also one that has no student or fails.

        Args:
            context: The trainer.
            probe: The student with its tokenizer and verifier; None if this process has no student at present.
            time_budget: What measurements may take.
            is_due: Whether figures are wanted; the next ones then are of all steps since the last.

        Returns:
            The figures by the name under which they are logged.
        """
        start_time = time.perf_counter()
        rollouts, self._rollouts = self._rollouts, []
        sampled = self._sampled
        ready = context.processes.gather_results(lambda: self._advance(context, probe, time_budget))
        if not all(process.knows_step for process in ready):  # another student
            self.curves, self._reference, self.points = StepCurves(), None, []
            return {}
        is_first = self._reference is None and any(process.shows_rollouts for process in ready)
        if not (is_due or is_first) or not ready[0].has_time:
            return {}
        present = self._sampled
        assert probe is not None
        assert sampled is not None
        assert present is not None
        try:
            metrics = self._measure(context, probe, rollouts, sampled)
            if is_due:
                cosines = self._cosines(context, sampled, present)
                metrics |= {f"odp/step/cosine/{teacher}": cosine for teacher, cosine in cosines.items()}
        finally:
            seconds = time.perf_counter() - start_time
            self.seconds += seconds
            time_budget.record_probe(KIND, seconds)
        return metrics

    def _advance(self, context: TrainerContext, probe: Probe | None, time_budget: TimeBudget) -> Readiness:
        """Copy the parameters after the step, from which the next batch will be sampled."""
        shows_rollouts, self._shows_rollouts = self._shows_rollouts, False
        sampled, self._sampled = self._sampled, None  # a failure must not leave an older copy behind
        if probe is None:
            return Readiness(False, shows_rollouts, False)
        self._sampled = KeptParameters.of(probe.student, context.step)
        knows_step = sampled is not None and sampled.fits(self._sampled)
        return Readiness(knows_step, shows_rollouts, self._has_time(time_budget))

    def _has_time(self, time_budget: TimeBudget) -> bool:
        """Whether ``max_overhead`` leaves time."""
        time_budget.update_run_time()
        has_time = True
        if time_budget.max_share is not None and KIND in time_budget.costs:
            seconds = time_budget.costs[KIND]
            own_share = SHARE * time_budget.max_share * time_budget.run_seconds
            has_time = self.seconds + seconds <= own_share and seconds <= time_budget.affordable_seconds
        return has_time

    def _measure(
        self, context: TrainerContext, probe: Probe, rollouts: Sequence[TrainingRollout], sampled: KeptParameters
    ) -> dict[str, float]:
        """Measure the gain from the reference to the parameters that the batch was sampled from."""
        reference = self._reference or sampled
        gathered = context.processes.gather_results(
            lambda: self._batch_gains.measure(context, probe, rollouts, reference, sampled)
        )
        shares = [share for share in gathered if share.rollouts]
        if not shares:  # the next figure is also of this step
            return {}
        figures = self.curves.add(shares, self.confidence)
        self._reference = sampled
        if figures:
            figures["steps"] = float(sampled.step - reference.step)
            self._keep_point({"step": float(sampled.step), **figures})
        return {f"odp/step/{name}": value for name, value in figures.items()}

    def _keep_point(self, point: dict[str, float]) -> None:
        self.points.append(point)
        if len(self.points) > MAXIMUM_POINTS:
            del self.points[::2]

    def take_points(self) -> list[dict[str, float]]:
        """Return the points that no record has yet, and forget them."""
        points, self.points = self.points, []
        return points

    def _cosines(self, context: TrainerContext, before: KeptParameters, after: KeptParameters) -> dict[str, float]:
        """Cosine of the last step with the direction of each teacher, on average over the processes."""
        gathered = context.processes.gather_results(
            lambda: step_cosines(before, after, self.directions) if self.directions else {}
        )
        teachers = {teacher: None for cosines in gathered for teacher in cosines}
        values = {teacher: [cosines[teacher] for cosines in gathered if teacher in cosines] for teacher in teachers}
        return {teacher: sum(of_processes) / len(of_processes) for teacher, of_processes in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, in plain Python; copies of parameters are not kept."""
        return {"seconds": self.seconds, "curves": self.curves.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        seconds = float(state["seconds"])
        self.curves.load_state_dict(state["curves"])
        self.seconds = seconds


def _are_same(batch: Sequence[TrainingRollout], other: Sequence[TrainingRollout]) -> bool:
    """Whether two batches hold the same responses to the same rows."""
    return len(batch) == len(other) and all(
        one.row is another.row and list(one.response_ids) == list(another.response_ids)
        for one, another in zip(batch, other, strict=True)
    )
