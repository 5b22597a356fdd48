import pytest
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.callbacks.time_budget import TimeBudget


@given(
    share=st.floats(0.01, 0.9),
    fixed=st.floats(0.01, 20),
    continuations=st.floats(0, 50),
    steps=st.lists(st.floats(0.01, 5), min_size=20, max_size=200),
    flexible=st.booleans(),
)
def test_after_the_first_probe_the_share_is_never_exceeded(share, fixed, continuations, steps, flexible):
    """On a simulated run whose probes cost what the last one cost, or less in proportion to their continuations."""
    time_budget = TimeBudget(share)
    probes = 0
    for step in steps:
        time_budget.run += step
        go, seconds = time_budget.plan("probe", flexible)
        if go:
            took = continuations if seconds is None else min(seconds, continuations)
            time_budget.run += fixed + took
            time_budget.book("probe", fixed + took, took, seconds is not None)
            probes += 1
            if probes > 1:
                assert time_budget.time_share <= share * (1 + 1e-9)
    assert probes >= 1
    assert time_budget.skipped == len(steps) - probes


def test_a_probe_that_fits_is_never_left_out():
    time_budget = TimeBudget(0.1)
    time_budget.book("probe", 1.0)
    time_budget.run = 30.0
    assert time_budget.plan("probe", False) == (True, None)
    assert time_budget.plan("free look", False) == (True, None), "another kind has its own cost"
    time_budget.probes = 2.5
    assert time_budget.plan("probe", False) == (False, None)
    assert time_budget.skipped == 1


def test_continuations_are_cut_to_what_is_left_unless_that_is_too_little():
    time_budget = TimeBudget(0.2, run=100.0, costs={"probe": (40.0, 30.0)})
    assert time_budget.plan("probe", True) == (True, pytest.approx(0.2 * 100 / 0.8 - 10))
    time_budget.run = 60.0  # 15 s, 5 of them for continuations: less than a quarter
    assert time_budget.plan("probe", True) == (False, None)


def test_without_a_limit_every_probe_runs():
    time_budget = TimeBudget(None, run=1.0)
    time_budget.book("probe", 1000.0, 900.0)
    assert time_budget.plan("probe", True) == (True, None)
    assert time_budget.time_share == 1000.0


def test_the_clock_counts_while_the_run_goes_on():
    time_budget = TimeBudget(0.1)
    time_budget.tick()
    assert time_budget.run == 0
    time_budget.start()
    time_budget.tick()
    before = time_budget.run
    assert before > 0
    time_budget.stop()
    after = time_budget.run
    time_budget.tick()
    assert time_budget.run == after >= before


def test_state():
    one = TimeBudget(0.1, run=5.0, probes=1.0, costs={"probe": (1.0, 0.5)}, skipped=3)
    other = TimeBudget(0.1)
    other.load_state_dict(one.state_dict())
    assert other == one


def test_what_a_probe_takes_to_log_and_draw_counts_as_the_probe_s() -> None:
    time_budget = TimeBudget(0.1, run=100.0)
    time_budget.book("probe", 4.0, 3.0)
    time_budget.extend("probe", 2.0)
    assert time_budget.probes == 6.0
    assert time_budget.costs["probe"] == (6.0, 3.0)
    time_budget.extend("probe", 1.0)
    assert time_budget.time_share == pytest.approx(0.07)
