"""Keeping what probes take below a share of the run."""

import time
from dataclasses import dataclass, field
from typing import Any

LEAST = 0.25
"""A probe with less than this share of its usual continuations is not worth its fixed costs; it is left out."""


@dataclass
class TimeBudget:
    r"""Measures the run and its probes, and says what the next one may cost.

    With :math:`R` seconds of run so far, of which probes took :math:`P`, a probe of :math:`c` seconds keeps their share
    at :math:`s` or below as long as :math:`P + c \le s (R + c)`.

    Attributes:
        share: The most that probes may take of the run's wall-clock time; None for no limit.
        run: Seconds of the run, probes included.
        probes: Seconds of all probes.
        costs: What a whole probe of each kind takes, by the last one: seconds, and of these on continuations.
        skipped: How many probes were left out.

    Examples:
        >>> time_budget = TimeBudget(0.1, run=90.0, probes=0.0)
        >>> round(time_budget.allowance, 6)
        10.0
        >>> time_budget.book("probe", 4.0, 3.0)
        >>> time_budget.plan("probe", flexible=False)
        (True, None)
    """

    share: float | None
    run: float = 0.0
    probes: float = 0.0
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: int = 0
    _clock: float | None = None

    def start(self) -> None:
        """The run goes on from here."""
        self._clock = time.perf_counter()

    def tick(self) -> None:
        """Add the time since the last look to the run's."""
        if self._clock is not None:
            now = time.perf_counter()
            self.run += now - self._clock
            self._clock = now

    def stop(self) -> None:
        """The run is over, or pauses."""
        self.tick()
        self._clock = None

    @property
    def allowance(self) -> float:
        """Seconds that a probe may take now."""
        if self.share is None:
            return float("inf")
        return (self.share * self.run - self.probes) / (1 - self.share)

    @property
    def time_share(self) -> float:
        """Of the run, what probes took; NaN where nothing has run."""
        return self.probes / self.run if self.run > 0 else float("nan")

    def book(self, kind: str, seconds: float, continuations: float = 0.0, limited: bool = False) -> None:
        """A probe of this kind took ``seconds``, of which ``continuations`` on continuations.

        ``limited``: those were fewer than usual, and say nothing of what a whole probe takes.
        """
        self.probes += seconds
        usual = self.costs[kind][1] if limited else continuations
        self.costs[kind] = seconds - continuations + usual, usual

    def extend(self, kind: str, seconds: float) -> None:
        """The last probe of this kind took so much more: to log, draw and keep what it found."""
        self.tick()
        self.probes += seconds
        whole, continuations = self.costs[kind]
        self.costs[kind] = whole + seconds, continuations

    def plan(self, kind: str, flexible: bool) -> tuple[bool, float | None]:
        """Whether to probe now, and for how many seconds to sample continuations (None: as configured).

        The first probe of a kind always runs: what it takes is not known before.

        Args:
            kind: Of probe.
            flexible: Whether continuations can be limited.
        """
        if self.share is None or kind not in self.costs:
            return True, None
        seconds, continuations = self.costs[kind]
        if seconds <= self.allowance:
            return True, None
        left = self.allowance - (seconds - continuations)
        if flexible and left >= LEAST * continuations > 0:
            return True, left
        self.skipped += 1
        return False, None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        self.tick()
        return {"run": self.run, "probes": self.probes, "costs": dict(self.costs), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self.run, self.probes = state["run"], state["probes"]
        self.costs, self.skipped = dict(state["costs"]), state["skipped"]
