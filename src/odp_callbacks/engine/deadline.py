"""The moment at which a probe must have ended."""

import math
import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns seconds since some moment."""


class Deadline:
    """A point in time that all stages of a probe share; every stage asks how much time is left.

    Args:
        seconds: Seconds from now; None for no deadline.
        clock: Tells the time.
        seconds_per_token: How long later stages take for each token that :meth:`reserve_for` is told of.

    Raises:
        ValueError: If ``seconds`` is not a positive number.

    Examples:
        >>> Deadline(None).remaining_seconds
        inf
        >>> Deadline(3600.0).has_passed
        False
    """

    def __init__(
        self, seconds: float | None = None, clock: Clock = time.perf_counter, seconds_per_token: float = 0.0
    ) -> None:
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"`seconds` must be a positive number or None, but {seconds!r} was given.")
        self.seconds = seconds
        self.seconds_per_token = seconds_per_token
        self.reserved_seconds = 0.0
        self._clock = clock
        self._start = clock()

    @property
    def is_finite(self) -> bool:
        """Whether there is a deadline at all."""
        return self.seconds is not None

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the clock was started."""
        return self._clock() - self._start

    @property
    def remaining_seconds(self) -> float:
        """Seconds that are left, at least 0; infinite without a deadline."""
        if self.seconds is None:
            return math.inf
        return max(0.0, self.seconds - self.elapsed_seconds - self.reserved_seconds)

    @property
    def has_passed(self) -> bool:
        """Whether no time is left."""
        return self.remaining_seconds == 0

    def allows(self, seconds: float) -> bool:
        """Whether work that takes this long would end in time."""
        return seconds <= self.remaining_seconds

    def reserve_for(self, tokens: int) -> None:
        """Keep the time that later stages will take for tokens that have been sampled."""
        self.reserved_seconds += tokens * self.seconds_per_token

    def earlier(self, seconds: float, seconds_per_token: float = 0.0) -> "Deadline":
        """A deadline that passes this many seconds before this one; one that is not in the future has passed.

        Args:
            seconds: What is kept for later stages.
            seconds_per_token: What later stages take for each token that is sampled until then.

        Examples:
            >>> deadline = Deadline(100.0, clock=lambda: 0.0)
            >>> deadline.earlier(40.0).remaining_seconds, deadline.earlier(200.0).has_passed
            (60.0, True)
        """
        other = Deadline(None, self._clock, seconds_per_token)
        other.seconds, other._start, other.reserved_seconds = self.seconds, self._start, self.reserved_seconds + seconds
        return other

    def part(self, parts: int) -> "Deadline":
        """A deadline for the first of several equal parts of the time that is left.

        Examples:
            >>> Deadline(90.0, clock=lambda: 0.0).part(2).remaining_seconds
            45.0
        """
        left = self.remaining_seconds if self.is_finite else 0.0
        return self.earlier(left * (1 - 1 / parts), self.seconds_per_token)

    def at_share(self, share: float, seconds_per_token: float = 0.0) -> "Deadline":
        """A deadline at a share of the seconds of this one, from the same start.

        Examples:
            >>> Deadline(100.0, clock=lambda: 0.0).at_share(0.25).remaining_seconds
            25.0
        """
        return self.earlier(0.0 if self.seconds is None else (1 - share) * self.seconds, seconds_per_token)
