"""The progress of a probe: beside the trainer's own bar, or line by line in the log where no bars are shown."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol, TextIO

from tqdm.auto import tqdm

QUIET = 0.5
"""Seconds between two drawings of a bar."""
SILENCE = 30.0
"""Seconds between two lines in the log."""


class Display(Protocol):
    """What shows a stage, and goes when the probe is done."""

    def show(self, stage: str, done: int, total: int, left: str) -> None:
        """Show a stage, what is done of it, how much there is, and what is said of the time left."""

    def close(self) -> None:
        """Vanish."""


class Bar:
    """A tqdm bar below those that are there already.

    Args:
        file: Where the trainer's bars are drawn; None for the standard error output.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self.bar: tqdm[Any] | None = None

    def show(self, stage: str, done: int, total: int, left: str) -> None:
        """Draw."""
        said = f"probe: {stage}"
        if self.bar is None:
            layout = "{desc} {n}/{total} {bar} {elapsed}{postfix}"
            self.bar = tqdm(desc=said, total=total, file=self.file, leave=False, dynamic_ncols=True, bar_format=layout)
        self.bar.set_description_str(said, refresh=False)
        self.bar.set_postfix_str(left, refresh=False)
        self.bar.total, self.bar.n = total, done
        self.bar.refresh()

    def close(self) -> None:
        """Clear the line."""
        if self.bar is not None:
            self.bar.close()


class RichTask:
    """A task in a live display of rich that is there already.

    Args:
        progress: A ``rich.progress.Progress``.
    """

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.task: Any = None

    def show(self, stage: str, done: int, total: int, left: str) -> None:
        """Draw."""
        if self.task is None:
            self.task = self.progress.add_task("probe", total=total)
        said = f"probe: {stage}{f', {left}' if left else ''}"
        self.progress.update(self.task, description=said, completed=done, total=total)
        self.progress.refresh()

    def close(self) -> None:
        """Hide it: Lightning finds its own tasks by their place, so none may be taken away."""
        if self.task is not None:
            self.progress.update(self.task, visible=False)
            self.progress.refresh()


def display_beside(bar: Any) -> Display | None:
    """The display that goes with a Lightning progress bar; None if there is none, or it shows nothing.

    Args:
        bar: ``trainer.progress_bar_callback``, of ``lightning`` or ``pytorch_lightning``; known by what it has.
    """
    if bar is None or getattr(bar, "is_disabled", False):
        return None
    if hasattr(getattr(bar, "progress", None), "add_task"):  # RichProgressBar
        return RichTask(bar.progress)
    return Bar(sys.stdout if hasattr(bar, "init_train_tqdm") else None)


class ProbeProgress:
    """Shows what a probe does and how long it will still take.

    What is left of a stage that has begun is told by what it has taken so far, of the others by the last probe. In the
    first probe only the stage at hand is known, and that is what is said.

    Args:
        display: What shows it; None writes lines instead.
        note: Where lines go if there is no display; None for nowhere.
        last: Seconds of each stage in the last probe; empty in the first.
        clock: Seconds.
    """

    def __init__(
        self,
        display: Display | None,
        note: Callable[[str], None] | None = None,
        last: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.display, self.note, self.last, self.clock = display, note, dict(last or {}), clock
        if "continuations" in self.last:
            # Where continuations wait for the verifier is booked on it, and takes its time here.
            self.last["continuations"] += self.last.pop("verifier", 0.0)
        self.start = self.drawn = self.before = clock()
        self.stage = ""
        self.first: dict[str, int] = {}
        self.spent: dict[str, float] = {}
        self.now: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self.report

    def __exit__(self, *_: object) -> None:
        if self.display is not None:
            with suppress(Exception):  # as with drawing it
                self.display.close()

    def report(self, stage: str, done: int, total: int) -> None:
        """Take notice of a stage, of what is done of it, and of how much there is."""
        now = self.clock()
        self.spent[self.stage] = self.spent.get(self.stage, 0.0) + now - self.before
        self.before, self.stage = now, stage
        self.first.setdefault(stage, done)
        self.now[stage] = done, total
        if now - self.drawn < (SILENCE if self.display is None else QUIET):
            return
        self.drawn = now
        stage_ = stage.replace("_", " ")
        left = self.left()
        if self.display is not None:
            try:
                self.display.show(stage_, done, total, left)
            except Exception as error:  # a bar that cannot be drawn must not cost the probe
                self.display = None
                if self.note is not None:
                    self.note(f"odp-callbacks: no progress bar of the probe: {type(error).__name__}: {error}")
        elif self.note is not None:
            so_far = f"{now - self.start:.0f} s so far"
            self.note(f"odp-callbacks: probe, {stage_} {done} of {total}, {so_far}{f', {left}' if left else ''}")

    def left(self) -> str:
        """What can be said of the time that is left."""
        here = self._left(self.stage)
        if self.last:
            order = list(self.last)
            # A stage that was passed by does not come any more: no continuation was needed, say.
            passed = order[: order.index(self.stage)] if self.stage in self.last else []
            parts = [self._left(s) for s in {*order, *self.now} if s in self.now or s not in passed]
            return f"about {sum(part for part in parts if part is not None):.0f} s left"
        return "" if here is None else f"{self.stage.replace('_', ' ')} done in about {here:.0f} s"

    def _left(self, stage: str) -> float | None:
        """Seconds left of a stage; None where nothing tells."""
        spent = self.spent.get(stage, 0.0)
        done, total = self.now.get(stage, (0, 0))
        fresh = done - self.first.get(stage, 0)
        if fresh > 0 and spent > 0:
            return spent / fresh * (total - done)
        if stage in self.last:
            return max(0.0, self.last[stage] - spent)
        return None
