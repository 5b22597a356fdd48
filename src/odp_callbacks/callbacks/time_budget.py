"""Limits the share of the training time that probes may take."""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from odp_callbacks.callbacks.trainer_context import TrainerContext

MINIMUM_CONTINUATION_SHARE = 0.25
"""A probe that could afford less than this share of its usual continuations is skipped: it would not be worth its
fixed costs."""


class ProbeCost(NamedTuple):
    """What a probe without a time limit takes, in seconds.

    Attributes:
        seconds: The whole probe.
        continuation_seconds: The part of it that is spent on continuations.
    """

    seconds: float
    continuation_seconds: float


@dataclass
class TimeBudget:
    r"""Measures the time of a run and of its probes, and decides what the next probe may take.

    When the run has taken :math:`R` seconds, :math:`P` of them in probes, a probe of :math:`c` seconds keeps the share
    of the probes at :math:`s` or below as long as :math:`P + c \le s (R + c)`.

    Attributes:
        max_share: The largest share of the run's wall-clock time that probes may take, in (0, 1); None for no limit.
        run_seconds: Seconds of the run, probes included.
        probe_seconds: Seconds of all probes.
        costs: What a probe of each kind takes, estimated from the last one.
        skipped_probes: How many probes were skipped.

    Examples:
        >>> time_budget = TimeBudget(0.1, run_seconds=90.0, probe_seconds=0.0)
        >>> round(time_budget.affordable_seconds, 6)
        10.0
        >>> time_budget.record_probe("probe", 4.0, 3.0)
        >>> time_budget.decide("probe", can_be_shortened=False)
        (True, None)
    """

    max_share: float | None
    run_seconds: float = 0.0
    probe_seconds: float = 0.0
    costs: dict[str, ProbeCost] = field(default_factory=dict)
    skipped_probes: int = 0
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

    def record_probe(
        self, kind: str, seconds: float, continuation_seconds: float = 0.0, shortened: bool = False
    ) -> None:
        """Record what a probe took.

        Args:
            kind: The kind of probe.
            seconds: The whole time of the probe.
            continuation_seconds: The part of it spent on continuations.
            shortened: Whether the continuations had a time limit. What they took then says nothing about a probe
                without a limit, so the earlier estimate is kept.
        """
        self.probe_seconds += seconds
        usual = self.costs[kind].continuation_seconds if shortened else continuation_seconds
        self.costs[kind] = ProbeCost(seconds - continuation_seconds + usual, usual)

    def extend_last_probe(self, kind: str, seconds: float) -> None:
        """Add the time that it took to log, draw and save the last probe of this kind."""
        self.update_run_time()
        self.probe_seconds += seconds
        cost = self.costs[kind]
        self.costs[kind] = cost._replace(seconds=cost.seconds + seconds)

    def decide(self, kind: str, can_be_shortened: bool) -> tuple[bool, float | None]:
        """Decide whether to probe now, and for how many seconds to sample continuations.

        The first probe of a kind always runs, because its cost is not known before.

        Args:
            kind: The kind of probe.
            can_be_shortened: Whether the probe can do with fewer continuations.

        Returns:
            Whether to probe, and the time limit for the continuations in seconds (None for no limit).
        """
        if self.max_share is None or kind not in self.costs:
            return True, None
        cost = self.costs[kind]
        if cost.seconds <= self.affordable_seconds:
            return True, None
        remaining = self.affordable_seconds - (cost.seconds - cost.continuation_seconds)
        if can_be_shortened and remaining >= MINIMUM_CONTINUATION_SHARE * cost.continuation_seconds > 0:
            return True, remaining
        self.skipped_probes += 1
        return False, None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, in plain Python."""
        self.update_run_time()
        return {
            "run_seconds": self.run_seconds,
            "probe_seconds": self.probe_seconds,
            "costs": {kind: tuple(cost) for kind, cost in self.costs.items()},
            "skipped_probes": self.skipped_probes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        run_seconds, probe_seconds = float(state["run_seconds"]), float(state["probe_seconds"])
        costs = {str(kind): ProbeCost(*map(float, cost)) for kind, cost in state["costs"].items()}
        self.skipped_probes = int(state["skipped_probes"])
        self.run_seconds, self.probe_seconds, self.costs = run_seconds, probe_seconds, costs


def decide_together(
    context: TrainerContext, time_budget: TimeBudget, kind: str, *, can_be_shortened: bool
) -> tuple[bool, float | None]:
    """Decide as :meth:`TimeBudget.decide` does, in all processes as the first one does, and inform about a first skip.

    The budget limits the share of a training; a probe outside a training always runs.

    Args:
        context: The trainer.
        time_budget: What probes may take.
        kind: The kind of probe.
        can_be_shortened: Whether the probe can do with fewer continuations.

    Returns:
        Whether to probe, and the time limit for the continuations in seconds (None for no limit).
    """
    if not context.is_training:
        return True, None
    time_budget.update_run_time()
    skipped_before = time_budget.skipped_probes
    has_time, time_limit = context.processes.broadcast(time_budget.decide(kind, can_be_shortened))
    if not has_time and skipped_before == 0:
        last_cost = time_budget.costs[kind].seconds
        context.inform(
            f"odp-callbacks: skipped the {kind} at step {context.step}: the last one took {last_cost:.1f} s, and "
            f"another one would exceed `max_overhead` = {time_budget.max_share} of the training time "
            f"({time_budget.time_share:.2f} so far). Later probes may be skipped, too; "
            "`odp/probe/left_out` counts them."
        )
    return has_time, time_limit
