"""A step is captured when it is run the second time on the same memory, and goes on where it cannot be."""

import pytest

from odp_callbacks.engine.sampling.step_graph import RepeatedStep


class Recorder:
    """Stands for a captured step: it says when it was captured and replayed."""

    def __init__(self, log, fails=False):
        self.log, self.fails = log, fails

    def __call__(self, step):
        self.log.append("capture")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self

    def replay(self):
        self.log.append("replay")


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (False, ["step", "capture", "replay", "replay", "forget", "step", "capture", "replay"]),
        (True, ["step", "capture", "step", "step", "forget", "step", "step"]),
    ],
)
def test_steps_run_once_each_whether_they_can_be_captured_or_not(fails, expected):
    log = []
    repeated = RepeatedStep(lambda: log.append("step"), Recorder(log, fails))
    for _ in range(3):
        repeated()
    log.append("forget")
    repeated.forget()
    for _ in range(2):
        repeated()
    assert log == expected
