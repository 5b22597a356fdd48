"""The progress of a probe: below the trainer's own bar, or line by line in the log where no bars are shown."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol, TextIO

from tqdm.auto import tqdm

SECONDS_BETWEEN_DRAWINGS = 0.5
SECONDS_BETWEEN_LOG_LINES = 30.0


class Display(Protocol):
    """Shows the stage of a probe."""

    def show(self, stage: str, done: int, total: int, time_left: str) -> None:
        """Show a stage, the work done, the total work, and a text about the time left."""

    def close(self) -> None:
        """Remove the display."""


class Bar:
    """A tqdm bar below those that exist already.

    Args:
        file: Where the trainer's bars are drawn; None for the standard error stream.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self.bar: tqdm[Any] | None = None

    def show(self, stage: str, done: int, total: int, time_left: str) -> None:
        """Draw the bar."""
        description = f"probe: {stage}"
        if self.bar is None:
            layout = "{desc} {n}/{total} {bar} {elapsed}{postfix}"
            self.bar = tqdm(
                desc=description, total=total, file=self.file, leave=False, dynamic_ncols=True, bar_format=layout
            )
        self.bar.set_description_str(description, refresh=False)
        self.bar.set_postfix_str(time_left, refresh=False)
        self.bar.total, self.bar.n = total, done
        self.bar.refresh()

    def close(self) -> None:
        """Clear the line."""
        if self.bar is not None:
            self.bar.close()


class RichTask:
    """A task in a live display of rich that exists already.

    Args:
        progress: A ``rich.progress.Progress``.
    """

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.task: Any = None

    def show(self, stage: str, done: int, total: int, time_left: str) -> None:
        """Draw the task."""
        if self.task is None:
            self.task = self.progress.add_task("probe", total=total)
        description = f"probe: {stage}{f', {time_left}' if time_left else ''}"
        self.progress.update(self.task, description=description, completed=done, total=total)
        self.progress.refresh()

    def close(self) -> None:
        """Hide the task; it cannot be removed, because Lightning finds its own tasks by their position."""
        if self.task is not None:
            self.progress.update(self.task, visible=False)
            self.progress.refresh()


def display_beside(bar: Any) -> Display | None:
    """Return the display that fits a Lightning progress bar; None if there is no bar, or it shows nothing.

    Args:
        bar: ``trainer.progress_bar_callback`` of ``lightning`` or ``pytorch_lightning``, recognised by its attributes.
    """
    if bar is None or getattr(bar, "is_disabled", False):
        return None
    if hasattr(getattr(bar, "progress", None), "add_task"):  # RichProgressBar
        return RichTask(bar.progress)
    return Bar(sys.stdout if hasattr(bar, "init_train_tqdm") else None)


class ProbeProgress:
    """Shows what a probe does and how long it will still take.

    The time left of a stage that has begun is extrapolated from the time it has taken so far; that of the other stages
    is taken from the last probe. In the first probe only the time left of the current stage can be shown.

    Args:
        display: Shows the progress; None writes log lines instead.
        inform: Writes a log line; None for no log lines.
        last_seconds: Seconds of each stage in the last probe; empty in the first.
        clock: Returns the current time in seconds.
    """

    def __init__(
        self,
        display: Display | None,
        inform: Callable[[str], None] | None = None,
        last_seconds: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.display, self.inform, self.clock = display, inform, clock
        self.last_seconds = dict(last_seconds or {})
        if "continuations" in self.last_seconds:
            # The time in which continuations wait for the verifier is recorded as the verifier's, but passes here.
            self.last_seconds["continuations"] += self.last_seconds.pop("verifier", 0.0)
        self.start_time = self.last_drawn = self.last_report = clock()
        self.stage = ""
        self.initial_work: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.work: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self.report

    def __exit__(self, *_: object) -> None:
        if self.display is not None:
            with suppress(Exception):  # a display that cannot be removed must not fail the probe
                self.display.close()

    def report(self, stage: str, done: int, total: int) -> None:
        """Record and show the current stage, the work done and the total work."""
        current_time = self.clock()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + current_time - self.last_report
        self.last_report, self.stage = current_time, stage
        self.initial_work.setdefault(stage, done)
        self.work[stage] = done, total
        interval = SECONDS_BETWEEN_LOG_LINES if self.display is None else SECONDS_BETWEEN_DRAWINGS
        if current_time - self.last_drawn >= interval:
            self.last_drawn = current_time
            self._show(stage.replace("_", " "), done, total, current_time - self.start_time)

    def _show(self, stage: str, done: int, total: int, elapsed_seconds: float) -> None:
        time_left = self.time_left()
        if self.display is not None:
            try:
                self.display.show(stage, done, total, time_left)
            except Exception as error:  # a bar that cannot be drawn must not fail the probe
                self.display = None
                if self.inform is not None:
                    self.inform(f"odp-callbacks: no progress bar of the probe: {type(error).__name__}: {error}")
        elif self.inform is not None:
            elapsed = f"{elapsed_seconds:.0f} s so far"
            self.inform(
                f"odp-callbacks: probe, {stage} {done} of {total}, {elapsed}{f', {time_left}' if time_left else ''}"
            )

    def time_left(self) -> str:
        """Return a text about the time left; empty if nothing is known about it."""
        if self.last_seconds:
            stage_order = list(self.last_seconds)
            # Stages before the current one that never began will not come: no continuation was needed, for example.
            skipped = stage_order[: stage_order.index(self.stage)] if self.stage in self.last_seconds else []
            coming = [stage for stage in {*stage_order, *self.work} if stage in self.work or stage not in skipped]
            remaining = [self._seconds_left(stage) for stage in coming]
            return f"about {sum(seconds for seconds in remaining if seconds is not None):.0f} s left"
        seconds_left = self._seconds_left(self.stage)
        return "" if seconds_left is None else f"{self.stage.replace('_', ' ')} done in about {seconds_left:.0f} s"

    def _seconds_left(self, stage: str) -> float | None:
        """Seconds left of a stage; None if nothing is known about it."""
        seconds_taken = self.seconds.get(stage, 0.0)
        done, total = self.work.get(stage, (0, 0))
        work_since_start = done - self.initial_work.get(stage, 0)
        if work_since_start > 0 and seconds_taken > 0:
            return seconds_taken / work_since_start * (total - done)
        if stage in self.last_seconds:
            return max(0.0, self.last_seconds[stage] - seconds_taken)
        return None
