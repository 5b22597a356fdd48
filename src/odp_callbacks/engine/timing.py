"""How long each stage of a probe takes, and the progress that it reports."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is in all."""

GrowingProgress = Callable[[int, int], None]
"""Called with how much of a stage is done, and how much there is in all as far as known."""


@dataclass
class StageTimer:
    """Measures the time of each stage and reports its progress.

    Attributes:
        progress: Called with the stage's name, the amount done, and the total; None reports nothing.
        seconds: Time taken so far by stage.
    """

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Subtract time from one stage and add it to another."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    @contextmanager
    def stage(self, name: str, total: int, part: range | None = None) -> Iterator[Callable[[int], None]]:
        """Time a stage, or a part of it.

        Args:
            name: The stage's name.
            total: The amount of work in the whole stage.
            part: The part of it that is done inside the context; None for all of it.

        Yields:
            A function that reports how much of the part is done.
        """
        start_time = time.perf_counter()
        work_range = range(total) if part is None else part

        def report_progress(done: int) -> None:
            if self.progress is not None:
                self.progress(name, work_range.start + done, total)

        report_progress(0)
        yield report_progress
        report_progress(len(work_range))
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_time

    @contextmanager
    def growing_stage(self, name: str) -> Iterator[GrowingProgress]:
        """Time a stage whose amount of work is only known when it ends.

        Args:
            name: The stage's name.

        Yields:
            A function that reports how much is done, and how much there is in all as far as known.
        """
        start_time = time.perf_counter()
        most_done = 0

        def report_progress(done: int, total: int) -> None:
            nonlocal most_done
            most_done = max(most_done, done)
            if self.progress is not None:
                self.progress(name, done, max(done, total))

        report_progress(0, 0)
        yield report_progress
        report_progress(most_done, most_done)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_time
