"""What the time budget lets probes take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.callbacks.time_budget import ProbeCost, TimeBudget


@given(
    max_share=st.floats(0.01, 0.9),
    fixed_seconds=st.floats(0.01, 20),
    continuation_seconds=st.floats(0, 50),
    step_seconds=st.lists(st.floats(0.01, 5), min_size=20, max_size=200),
    can_be_shortened=st.booleans(),
)
def test_after_the_first_probe_the_share_is_never_exceeded(
    max_share, fixed_seconds, continuation_seconds, step_seconds, can_be_shortened
):
    """On a simulated run whose probes cost what the last one cost, or less in proportion to their continuations."""
    time_budget = TimeBudget(max_share)
    probe_count = 0
    for seconds in step_seconds:
        time_budget.run_seconds += seconds
        has_time, time_limit = time_budget.decide("probe", can_be_shortened)
        if has_time:
            taken = continuation_seconds if time_limit is None else min(time_limit, continuation_seconds)
            time_budget.run_seconds += fixed_seconds + taken
            time_budget.record_probe("probe", fixed_seconds + taken, taken, time_limit is not None)
            probe_count += 1
            if probe_count > 1:
                assert time_budget.time_share <= max_share * (1 + 1e-9)
    assert probe_count >= 1
    assert time_budget.skipped_probes == len(step_seconds) - probe_count


def test_a_probe_that_fits_is_never_skipped():
    time_budget = TimeBudget(0.1)
    time_budget.record_probe("probe", 1.0)
    time_budget.run_seconds = 30.0
    assert time_budget.decide("probe", False) == (True, None)
    assert time_budget.decide("update probe", False) == (True, None), "another kind has its own cost"
    time_budget.probe_seconds = 2.5
    assert time_budget.decide("probe", False) == (False, None)
    assert time_budget.skipped_probes == 1


def test_continuations_are_limited_to_the_remaining_time_unless_that_is_too_little():
    time_budget = TimeBudget(0.2, run_seconds=100.0, costs={"probe": ProbeCost(40.0, 30.0)})
    assert time_budget.decide("probe", True) == (True, pytest.approx(0.2 * 100 / 0.8 - 10))
    time_budget.run_seconds = 60.0  # 15 s, 5 of them for continuations: less than a quarter
    assert time_budget.decide("probe", True) == (False, None)


def test_without_a_limit_every_probe_runs():
    time_budget = TimeBudget(None, run_seconds=1.0)
    time_budget.record_probe("probe", 1000.0, 900.0)
    assert time_budget.decide("probe", True) == (True, None)
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
    saved = TimeBudget(0.1, run_seconds=5.0, probe_seconds=1.0, costs={"probe": ProbeCost(1.0, 0.5)}, skipped_probes=3)
    restored = TimeBudget(0.1)
    restored.load_state_dict(saved.state_dict())
    assert restored == saved


def test_the_time_to_log_and_draw_a_probe_counts_as_the_probe_s() -> None:
    time_budget = TimeBudget(0.1, run_seconds=100.0)
    time_budget.record_probe("probe", 4.0, 3.0)
    time_budget.extend_last_probe("probe", 2.0)
    assert time_budget.probe_seconds == 6.0
    assert time_budget.costs["probe"] == (6.0, 3.0)
    time_budget.extend_last_probe("probe", 1.0)
    assert time_budget.time_share == pytest.approx(0.07)
