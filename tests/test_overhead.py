import pytest
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.overhead import Overhead


@given(
    share=st.floats(0.01, 0.9),
    fixed=st.floats(0.01, 20),
    continuations=st.floats(0, 50),
    steps=st.lists(st.floats(0.01, 5), min_size=20, max_size=200),
    flexible=st.booleans(),
)
def test_after_the_first_probe_the_share_is_never_exceeded(share, fixed, continuations, steps, flexible):
    """On a simulated run whose probes cost what the last one cost, or less in proportion to their continuations."""
    overhead = Overhead(share)
    probes = 0
    for step in steps:
        overhead.run += step
        go, seconds = overhead.plan("probe", flexible)
        if go:
            took = continuations if seconds is None else min(seconds, continuations)
            overhead.run += fixed + took
            overhead.book("probe", fixed + took, took, seconds is not None)
            probes += 1
            if probes > 1:
                assert overhead.time_share <= share * (1 + 1e-9)
    assert probes >= 1
    assert overhead.skipped == len(steps) - probes


def test_a_probe_that_fits_is_never_left_out():
    overhead = Overhead(0.1)
    overhead.book("probe", 1.0)
    overhead.run = 30.0
    assert overhead.plan("probe", False) == (True, None)
    assert overhead.plan("free look", False) == (True, None), "another kind has its own cost"
    overhead.probes = 2.5
    assert overhead.plan("probe", False) == (False, None)
    assert overhead.skipped == 1


def test_continuations_are_cut_to_what_is_left_unless_that_is_too_little():
    overhead = Overhead(0.2, run=100.0, costs={"probe": (40.0, 30.0)})
    assert overhead.plan("probe", True) == (True, pytest.approx(0.2 * 100 / 0.8 - 10))
    overhead.run = 60.0  # 15 s, 5 of them for continuations: less than a quarter
    assert overhead.plan("probe", True) == (False, None)


def test_without_a_limit_every_probe_runs():
    overhead = Overhead(None, run=1.0)
    overhead.book("probe", 1000.0, 900.0)
    assert overhead.plan("probe", True) == (True, None)
    assert overhead.time_share == 1000.0


def test_the_clock_counts_while_the_run_goes_on():
    overhead = Overhead(0.1)
    overhead.tick()
    assert overhead.run == 0
    overhead.start()
    overhead.tick()
    before = overhead.run
    assert before > 0
    overhead.stop()
    after = overhead.run
    overhead.tick()
    assert overhead.run == after >= before


def test_state():
    one = Overhead(0.1, run=5.0, probes=1.0, costs={"probe": (1.0, 0.5)}, skipped=3)
    other = Overhead(0.1)
    other.load_state_dict(one.state_dict())
    assert other == one


def test_what_a_probe_takes_to_log_and_draw_counts_as_the_probe_s() -> None:
    overhead = Overhead(0.1, run=100.0)
    overhead.book("probe", 4.0, 3.0)
    overhead.extend("probe", 2.0)
    assert overhead.probes == 6.0
    assert overhead.costs["probe"] == (6.0, 3.0)
    overhead.extend("probe", 1.0)
    assert overhead.time_share == pytest.approx(0.07)
