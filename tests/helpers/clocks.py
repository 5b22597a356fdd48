"""A clock that only a model's work moves, so that limits of time are tested exactly and at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from odp_callbacks.engine import probe as probe_module
from odp_callbacks.engine.deadline import Deadline


class WorkClock:
    """Tells the time by the work that was done.

    Attributes:
        seconds: The time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@contextmanager
def clock_of(
    student: Any, monkeypatch: pytest.MonkeyPatch, seconds_per_token: float, seconds_per_pass: float = 0.0
) -> Iterator[WorkClock]:
    """Let each pass of the student take time, and let the deadlines of probes be measured by it.

    Args:
        student: A peft model.
        monkeypatch: Replaces the clock of probes.
        seconds_per_token: What each token of a forward pass takes.
        seconds_per_pass: What each pass takes besides.
    """
    clock = WorkClock()

    def work(module: Any, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        clock.seconds += seconds_per_pass + seconds_per_token * states.shape[:-1].numel()

    monkeypatch.setattr(probe_module, "Deadline", lambda seconds: Deadline(seconds, clock))
    hook = student.get_base_model().model.layers[0].register_forward_hook(work)
    try:
        yield clock
    finally:
        hook.remove()
