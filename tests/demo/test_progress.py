"""The time left: what is expected, at the pace of the finished work."""

from io import StringIO

import pytest
from rich.console import Console

from odp_callbacks.demo.progress import FIRST_GUESS_SECONDS, StageProgress, TimeLeft

EXPECTED = {"sample": 10.0, "measure": 60.0, "step": 5.0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_finished_work_sets_the_pace_of_what_comes() -> None:
    clock = Clock()
    left = TimeLeft(EXPECTED, clock)
    assert left.seconds() == 75
    left.start("sample")
    clock.now = 4.0
    assert left.seconds() == 71, "without a sign of progress, the time that passes is subtracted"
    clock.now = 40.0
    assert left.seconds() == 65, "a stage that is late is not expected to have a negative rest"
    left.start("measure")
    pace = (40 + FIRST_GUESS_SECONDS) / (10 + FIRST_GUESS_SECONDS)
    assert left.seconds() == pytest.approx(pace * 65)
    clock.now = 40.0 + 90.0
    left.advance(0.5)
    pace = (130 + FIRST_GUESS_SECONDS) / (40 + FIRST_GUESS_SECONDS)
    assert left.seconds() == pytest.approx(90 + pace * 5), "the other half takes as long as this one"
    clock.now += 10.0
    assert left.seconds() == pytest.approx(80 + pace * 5)
    left.start("step")
    left.advance(1.0)
    assert left.seconds() == 0


def test_a_stage_that_was_not_expected_counts_nowhere() -> None:
    clock = Clock()
    left = TimeLeft(EXPECTED, clock)
    left.start("sample")
    clock.now = 10.0
    left.start("another stage")
    clock.now = 500.0
    left.advance(0.5)
    left.start("measure")
    assert left.seconds() == pytest.approx(65)


def test_a_log_file_gets_a_line_for_each_stage() -> None:
    file = StringIO()
    with StageProgress(Console(file=file, width=100), EXPECTED) as progress:
        for stage in EXPECTED:
            progress.report(stage, 0, 2)
            progress.report(stage, 1, 2)
    lines = file.getvalue().splitlines()
    assert lines[0] == "sample, about 75 s left"
    assert [line.partition(",")[0] for line in lines if line] == list(EXPECTED)
