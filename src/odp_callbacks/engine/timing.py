"""What a probe spends its time on, and who is told."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from odp_callbacks.engine.sampling.continuous_batching import Progress


@dataclass
class StageTimer:
    """Seconds by stage, and who is told of the progress."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    def move(self, stage: str, other: str, seconds: float) -> None:
        """Book seconds of one stage on another."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) - seconds
        self.seconds[other] = self.seconds.get(other, 0.0) + seconds

    @contextmanager
    def stage(self, name: str, total: int, part: range | None = None) -> Iterator[Callable[[int], None]]:
        """Time a stage, or a part of it; gives the function to report what is done of that.

        Args:
            name: Of the stage.
            total: How much the whole stage has.
            part: What of it is done here; None for all of it.
        """
        start = time.perf_counter()
        part = range(total) if part is None else part

        def report(done: int) -> None:
            if self.progress is not None:
                self.progress(name, part.start + done, total)

        report(0)
        yield report
        report(len(part))
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
