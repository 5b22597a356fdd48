"""What the demo is doing, and how long that will still take."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

FIRST_GUESS_SECONDS = 20.0
"""Work at the expected pace that the first guess counts as: a first stage says little, because it also warms up."""


class TimeLeft:
    """Estimates how long stages will still take: what each is expected to take, at the pace of the finished work.

    Args:
        expected: Seconds of each stage on a usual machine, in the order in which they come.
        clock: Returns the current time in seconds.

    Examples:
        >>> times = iter([0.0, 0.0, 120.0, 120.0])
        >>> left = TimeLeft({"sample": 30.0, "step": 5.0}, clock=lambda: next(times))
        >>> left.start("sample")
        >>> left.start("step")  # sampling took four times as long as expected
        >>> left.seconds()  # (120 + 20) / (30 + 20) times the expected 5 seconds
        14.0
    """

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.expected, self.clock = dict(expected), clock
        self.taken: dict[str, float] = {}
        self.stage = ""
        self._start = self._last_sign = clock()
        self._share = 0.0

    def start(self, stage: str) -> None:
        """Begin a stage, which ends the one before it; one that was not expected counts nowhere."""
        start = self.clock()
        if self.stage in self.expected:
            self.taken[self.stage] = self.taken.get(self.stage, 0.0) + start - self._start
        self.stage, self._start, self._last_sign, self._share = stage, start, start, 0.0

    def advance(self, share: float) -> None:
        """Say which share of the current stage is done."""
        self._share, self._last_sign = share, self.clock()

    def seconds(self) -> float:
        """Seconds until the end of the last stage."""
        since_last_sign, elapsed = self.clock() - self._last_sign, self._last_sign - self._start
        current = self.expected.get(self.stage, 0.0)
        usual = sum(self.expected[stage] for stage in self.taken) + self._share * current
        taken = sum(self.taken.values()) + (elapsed if self._share else 0.0)
        pace = (taken + FIRST_GUESS_SECONDS) / (usual + FIRST_GUESS_SECONDS)
        coming = sum(seconds for stage, seconds in self.expected.items() if stage not in {*self.taken, self.stage})
        rest = elapsed / self._share * (1 - self._share) if self._share else pace * current
        return pace * coming + max(0.0, rest - since_last_sign)


class StageProgress:
    """Shows the current stage, a bar, and the time left, below what is printed; a line for each stage in a log file.

    Args:
        console: Where it is shown.
        expected: Seconds of each stage on a usual machine, in the order in which they come.
    """

    def __init__(self, console: Console, expected: Mapping[str, float]) -> None:
        self.console = console
        self.left = TimeLeft(expected)
        columns = (TextColumn("{task.description}"), BarColumn(), _TimeLeftColumn(self.left))
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> "StageProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def report(self, stage: str, done: int, total: int) -> None:
        """Say which stage is under way, and how much of it is done."""
        if stage != self.left.stage:
            self.left.start(stage)
            self.bar.update(self.task, description=stage)
            if not self.console.is_terminal:
                self.console.print(f"{stage}, about {self.left.seconds():.0f} s left")
        share = done / total if total else 0.0
        self.left.advance(share)
        self.bar.update(self.task, completed=share)


class _TimeLeftColumn(ProgressColumn):
    """The time left, drawn anew with every frame."""

    def __init__(self, left: TimeLeft) -> None:
        super().__init__()
        self.left = left

    def render(self, task: Task) -> Text:
        return Text(f"about {self.left.seconds():.0f} s left", style="progress.remaining")
