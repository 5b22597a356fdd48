"""Limits the share of the training time that probes may take."""

import time
from dataclasses import dataclass, field
from typing import Any

from odp_callbacks.callbacks.trainer_context import TrainerContext

MINIMUM_SHARE = 0.5
"""A probe that could afford less than this share of its usual time is skipped: too much would be left out."""
FIRST_SHARE = 0.25
"""Share of what ``max_overhead`` allows for the whole planned run that the first probe of a kind may take."""
FIRST_SECONDS = 60.0
"""What the first probe may take at least, so that a run of a few steps shows figures, too."""
ASSUMED_RUN_SECONDS = 3600.0
"""How long a run is taken to be if its steps are not known, or before the first one has been timed."""


@dataclass(frozen=True)
class ProbeLimit:
    """Whether to probe, and for how long.

    Attributes:
        has_time: Whether to probe.
        seconds: How many seconds the probe may take; None for no limit.
        reason: Why it is so many.
    """

    has_time: bool
    seconds: float | None = None
    reason: str = ""


@dataclass
class TimeBudget:
    r"""Measures the time of a run and of its probes, and decides what the next probe may take.

    When the run has taken :math:`R` seconds, :math:`P` of them in probes, a probe of :math:`c` seconds keeps the share
    of the probes at :math:`s` or below as long as :math:`P + c \le s (R + c)`. The cost of the first probe is not
    known before. It may take a part of what the whole run allows: :math:`n` steps of :math:`t` seconds allow probes of
    :math:`s n t / (1 - s)` seconds.

    Attributes:
        max_share: The largest share of the run's wall-clock time that probes may take, in (0, 1); None for no limit.
        run_seconds: Seconds of the run, probes included.
        probe_seconds: Seconds of all probes.
        costs: What a probe of each kind takes without a limit, estimated from the last one.
        skipped_probes: How many probes were skipped.
        first_step: The optimizer step at which the run started.

    Examples:
        >>> time_budget = TimeBudget(0.1, run_seconds=90.0, probe_seconds=0.0)
        >>> round(time_budget.affordable_seconds, 6)
        10.0
        >>> time_budget.record_probe("probe", 4.0)
        >>> time_budget.decide("probe", step=10, planned_steps=100).has_time
        True
    """

    max_share: float | None
    run_seconds: float = 0.0
    probe_seconds: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    skipped_probes: int = 0
    first_step: int = 0
    _last_update: float | None = None

    def start(self) -> None:
        """Start the clock of the run."""
        self._last_update = time.perf_counter()

    def update_run_time(self) -> None:
        """Add the time since the last update to the time of the run; does nothing while the clock is stopped."""
        if self._last_update is not None:
            current_time = time.perf_counter()
            self.run_seconds += current_time - self._last_update
            self._last_update = current_time

    def stop(self) -> None:
        """Stop the clock: the run has ended, or pauses."""
        self.update_run_time()
        self._last_update = None

    @property
    def affordable_seconds(self) -> float:
        """How many seconds a probe may take at present."""
        if self.max_share is None:
            return float("inf")
        return (self.max_share * self.run_seconds - self.probe_seconds) / (1 - self.max_share)

    @property
    def time_share(self) -> float:
        """The share of the run's time that probes took; NaN before the run has taken any time."""
        return self.probe_seconds / self.run_seconds if self.run_seconds > 0 else float("nan")

    def record_probe(self, kind: str, seconds: float, limit: float | None = None) -> None:
        """Record what a probe took.

        Args:
            kind: The kind of probe.
            seconds: The whole time of the probe.
            limit: The limit that it had. What a probe takes that used it up says nothing about one without a limit, so
                that an earlier and larger estimate is kept.
        """
        self.probe_seconds += seconds
        used_up = limit is not None and seconds > MINIMUM_SHARE * limit
        self.costs[kind] = max(seconds, self.costs.get(kind, 0.0)) if used_up else seconds

    def extend_last_probe(self, kind: str, seconds: float) -> None:
        """Add the time that it took to log, draw and save the last probe of this kind."""
        self.update_run_time()
        self.probe_seconds += seconds
        self.costs[kind] += seconds

    def decide(self, kind: str, step: int, planned_steps: int | None) -> ProbeLimit:
        """Decide whether to probe now, and for how long.

        The first probe of a kind always runs, within what the planned run allows.

        Args:
            kind: The kind of probe.
            step: Number of optimizer steps taken.
            planned_steps: Number of optimizer steps at the end of the run; None if that is not known.
        """
        if self.max_share is None:
            return ProbeLimit(True)
        if kind not in self.costs:
            return self._first_limit(step, planned_steps)
        cost = self.costs[kind]
        if cost <= self.affordable_seconds:
            return ProbeLimit(True)
        if self.affordable_seconds >= MINIMUM_SHARE * cost:
            reason = f"what `max_overhead` = {self.max_share} allows at this step"
            return ProbeLimit(True, self.affordable_seconds, reason)
        self.skipped_probes += 1
        return ProbeLimit(False)

    def _first_limit(self, step: int, planned_steps: int | None) -> ProbeLimit:
        """The limit of the first probe of a kind."""
        assert self.max_share is not None
        steps, training_seconds = step - self.first_step, self.run_seconds - self.probe_seconds
        planned_seconds = ASSUMED_RUN_SECONDS
        run = f"a run of {ASSUMED_RUN_SECONDS:,.0f} s, which is assumed as no step has been timed"
        if planned_steps is None:
            run = f"a run of {ASSUMED_RUN_SECONDS:,.0f} s, which is assumed as its steps are not known"
        elif steps > 0:
            step_seconds = training_seconds / steps
            planned_seconds = (planned_steps - self.first_step) * step_seconds
            run = f"{planned_steps - self.first_step:,} planned steps of {step_seconds:.2g} s"
        allowed = self.max_share * max(planned_seconds, training_seconds) / (1 - self.max_share) - self.probe_seconds
        seconds = max(FIRST_SECONDS, FIRST_SHARE * allowed)
        reason = f"{FIRST_SHARE:.0%} of what `max_overhead` = {self.max_share} allows for {run}"
        reason = f"the least that a first probe gets, as {reason} is less" if seconds == FIRST_SECONDS else reason
        return ProbeLimit(True, seconds, reason)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, in plain Python."""
        self.update_run_time()
        return {
            "run_seconds": self.run_seconds,
            "probe_seconds": self.probe_seconds,
            "costs": dict(self.costs),
            "skipped_probes": self.skipped_probes,
            "first_step": self.first_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        run_seconds, probe_seconds = float(state["run_seconds"]), float(state["probe_seconds"])
        costs = {str(kind): float(cost) for kind, cost in state["costs"].items()}
        skipped_probes, self.first_step = int(state["skipped_probes"]), int(state["first_step"])
        self.skipped_probes = skipped_probes
        self.run_seconds, self.probe_seconds, self.costs = run_seconds, probe_seconds, costs


def decide_together(context: TrainerContext, time_budget: TimeBudget, kind: str) -> ProbeLimit:
    """Decide as :meth:`TimeBudget.decide` does, in all processes as the first one does, and inform about a first skip.

    The budget limits the share of a training; a probe outside a training always runs.

    Args:
        context: The trainer.
        time_budget: What probes may take.
        kind: The kind of probe.
    """
    if not context.is_training:
        return ProbeLimit(True)
    time_budget.update_run_time()
    skipped_before = time_budget.skipped_probes
    limit = context.processes.broadcast(time_budget.decide(kind, context.step, context.planned_steps()))
    if not limit.has_time and skipped_before == 0:
        context.inform(
            f"odp-callbacks: skipped the {kind} at step {context.step}: one takes {time_budget.costs[kind]:.1f} s, and "
            f"another one would exceed `max_overhead` = {time_budget.max_share} of the training time "
            f"({time_budget.time_share:.2f} so far). Later probes may be skipped, too; "
            "`odp/probe/left_out` counts them."
        )
    return limit
