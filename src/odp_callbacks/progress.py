"""The progress of a probe, in a bar of its own."""

import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm


class ProbeProgress:
    """A progress bar that goes when the probe is done.

    Args:
        shown: False where the trainer shows none.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.bar: tqdm[Any] | None = None
        self.drawn = 0.0

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self.report

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, stage: str, done: int, total: int) -> None:
        """Show a stage's name, what is done of it, and how much there is."""
        now = time.monotonic()
        if not self.shown or now - self.drawn < 0.5:
            return
        self.drawn = now
        if self.bar is None:
            self.bar = tqdm(leave=False, dynamic_ncols=True, bar_format="{desc} {n}/{total} {bar} {elapsed}")
        self.bar.set_description_str(f"probe: {stage}", refresh=False)
        self.bar.total, self.bar.n = total, done
        self.bar.refresh()
