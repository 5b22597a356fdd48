"""The progress of a probe: in a bar of its own, or line by line in the log where no bars are shown."""

import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

QUIET = 0.5
"""Seconds between two drawings of the bar."""
SILENCE = 30.0
"""Seconds between two lines in the log."""


class ProbeProgress:
    """A progress bar that goes when the probe is done, or lines in the log.

    What is left is estimated for the stage at hand, from what it has taken so far.

    Args:
        shown: Whether to draw a bar; False where the trainer shows none.
        note: Where lines go if no bar is drawn; None for nowhere.
        clock: Seconds.
    """

    def __init__(
        self, shown: bool, note: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shown, self.note, self.clock = shown, note, clock
        self.bar: tqdm[Any] | None = None
        self.start = self.drawn = clock()
        self.stage, self.since, self.first = "", self.start, 0

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self.report

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, stage: str, done: int, total: int) -> None:
        """Show a stage's name, what is done of it, and how much there is."""
        now = self.clock()
        if stage != self.stage:
            self.stage, self.since, self.first = stage, now, done
        if now - self.drawn < (QUIET if self.shown else SILENCE):
            return
        self.drawn = now
        if self.shown:
            self._draw(stage, done, total, self._left(now, done, total))
        elif self.note is not None:
            self.note(
                f"odp-callbacks: probe, {stage} {done} of {total}, {now - self.start:.0f} s so far"
                f"{self._left(now, done, total)}"
            )

    def _left(self, now: float, done: int, total: int) -> str:
        fresh = done - self.first
        if fresh < 1 or now <= self.since or done >= total:
            return ""
        return f", {self.stage} done in about {(now - self.since) / fresh * (total - done):.0f} s"

    def _draw(self, stage: str, done: int, total: int, left: str) -> None:
        if self.bar is None:
            self.bar = tqdm(leave=False, dynamic_ncols=True, bar_format="{desc} {n}/{total} {bar} {elapsed}{postfix}")
        self.bar.set_description_str(f"probe: {stage}", refresh=False)
        self.bar.set_postfix_str(left.removeprefix(", ").removeprefix(f"{stage} "), refresh=False)
        self.bar.total, self.bar.n = total, done
        self.bar.refresh()
