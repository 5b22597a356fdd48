"""What the time budget lets probes take."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.callbacks.time_budget import (
    ASSUMED_RUN_SECONDS,
    FIRST_SECONDS,
    FIRST_SHARE,
    ProbeLimit,
    TimeBudget,
    decide_together,
)
from tests.helpers.monitors import RecordingTrainer


@given(
    max_share=st.floats(0.01, 0.9),
    probe_seconds=st.floats(0.01, 70),
    step_seconds=st.lists(st.floats(0.01, 5), min_size=20, max_size=200),
)
def test_after_the_first_probe_the_share_is_never_exceeded(max_share, probe_seconds, step_seconds):
    """On a simulated run whose probes keep to their limit."""
    time_budget = TimeBudget(max_share)
    probe_count = 0
    for step, seconds in enumerate(step_seconds, 1):
        time_budget.run_seconds += seconds
        limit = time_budget.decide("probe", step, len(step_seconds))
        if limit.has_time:
            taken = probe_seconds if limit.seconds is None else min(limit.seconds, probe_seconds)
            time_budget.run_seconds += taken
            time_budget.record_probe("probe", taken, limit.seconds)
            probe_count += 1
            if probe_count > 1:
                assert time_budget.time_share <= max_share * (1 + 1e-9)
    assert probe_count >= 1
    assert time_budget.skipped_probes == len(step_seconds) - probe_count


def test_a_probe_that_fits_is_never_skipped():
    time_budget = TimeBudget(0.1)
    time_budget.record_probe("probe", 1.0)
    time_budget.run_seconds = 30.0
    assert time_budget.decide("probe", 1, None) == ProbeLimit(True)
    assert time_budget.decide("update probe", 1, None).has_time, "another kind has its own cost"
    time_budget.probe_seconds = 2.7
    assert time_budget.decide("probe", 1, None) == ProbeLimit(False)
    assert time_budget.skipped_probes == 1


def test_a_probe_is_limited_to_the_remaining_time_unless_that_is_too_little():
    time_budget = TimeBudget(0.2, run_seconds=100.0, costs={"probe": 40.0})
    assert time_budget.decide("probe", 1, None).seconds == pytest.approx(0.2 * 100 / 0.8)
    time_budget.run_seconds = 60.0  # 15 s, less than half
    assert not time_budget.decide("probe", 1, None).has_time


def test_the_first_probe_may_take_a_part_of_what_the_planned_run_allows():
    time_budget = TimeBudget(0.2, run_seconds=1000.0, first_step=50)
    limit = time_budget.decide("probe", step=60, planned_steps=1050)  # 1,000 steps of 100 s
    assert limit.seconds == pytest.approx(FIRST_SHARE * 0.2 / 0.8 * 1000 * 100)
    assert limit.reason == "25% of what `max_overhead` = 0.2 allows for 1,000 planned steps of 1e+02 s"


def test_before_the_first_step_and_without_known_steps_the_length_of_the_run_is_assumed():
    allowed = FIRST_SHARE * 0.2 / 0.8 * ASSUMED_RUN_SECONDS
    before = TimeBudget(0.2).decide("probe", 0, 1000)
    assert before.seconds == pytest.approx(allowed)
    assert "as no step has been timed" in before.reason
    unknown = TimeBudget(0.2, run_seconds=10.0).decide("probe", 5, None)
    assert unknown.seconds == pytest.approx(allowed)
    assert "as its steps are not known" in unknown.reason
    long_run = TimeBudget(0.2, run_seconds=1e6).decide("probe", 5, None)
    assert long_run.seconds == pytest.approx(FIRST_SHARE * 0.2 / 0.8 * 1e6)


def test_the_first_probe_of_a_short_run_gets_a_minute():
    limit = TimeBudget(0.1, run_seconds=0.5).decide("probe", 2, 4)
    assert limit.seconds == FIRST_SECONDS
    assert limit.reason.startswith("the least that a first probe gets")


def test_a_limit_that_was_used_up_says_nothing_about_a_probe_without_one():
    time_budget = TimeBudget(0.1)
    time_budget.record_probe("probe", 40.0, limit=60.0)
    time_budget.record_probe("probe", 21.0, limit=20.0)
    assert time_budget.costs == {"probe": 40.0}
    time_budget.record_probe("probe", 5.0, limit=20.0)
    assert time_budget.costs == {"probe": 5.0}


def test_all_processes_do_as_the_first_one_decides():
    """A process whose clock shows another time gets the same limit, to the last bit."""

    class Second:
        size = 2

        def broadcast(self, limit):
            return ProbeLimit(True, 12.5, "as the first process says")

    context = replace(RecordingTrainer().context(3), processes=Second())
    assert decide_together(context, TimeBudget(0.1, run_seconds=3.0), "probe").seconds == 12.5


def test_without_a_limit_every_probe_runs():
    time_budget = TimeBudget(None, run_seconds=1.0)
    time_budget.record_probe("probe", 1000.0)
    assert time_budget.decide("probe", 1, 100) == ProbeLimit(True)
    assert time_budget.time_share == 1000.0


def test_the_clock_counts_only_between_start_and_stop():
    time_budget = TimeBudget(0.1)
    time_budget.update_run_time()
    assert time_budget.run_seconds == 0
    time_budget.start()
    time_budget.update_run_time()
    while_running = time_budget.run_seconds
    assert while_running > 0
    time_budget.stop()
    when_stopped = time_budget.run_seconds
    time_budget.update_run_time()
    assert time_budget.run_seconds == when_stopped >= while_running


def test_a_checkpoint_restores_the_state():
    saved = TimeBudget(0.1, 5.0, 1.0, costs={"probe": 1.0}, skipped_probes=3, first_step=7)
    restored = TimeBudget(0.1)
    restored.load_state_dict(saved.state_dict())
    assert restored == saved


def test_the_time_to_log_and_draw_a_probe_counts_as_the_probe_s() -> None:
    time_budget = TimeBudget(0.1, run_seconds=100.0)
    time_budget.record_probe("probe", 4.0)
    time_budget.extend_last_probe("probe", 2.0)
    assert time_budget.probe_seconds == 6.0
    assert time_budget.costs["probe"] == 6.0
    time_budget.extend_last_probe("probe", 1.0)
    assert time_budget.time_share == pytest.approx(0.07)
