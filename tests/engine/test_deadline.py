"""Points in time that all stages of a probe share."""

import pytest

from odp_callbacks.engine.deadline import Deadline
from tests.helpers.clocks import WorkClock


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_a_deadline_needs_a_positive_number(seconds):
    with pytest.raises(ValueError, match="`seconds` must be a positive number or None"):
        Deadline(seconds)


def test_without_seconds_there_is_always_time():
    deadline = Deadline()
    deadline.reserve_for(10)
    assert not deadline.is_finite
    assert deadline.allows(1e12)
    assert not deadline.earlier(100.0).is_finite
    assert not deadline.part(3).has_passed


def test_it_passes_when_its_seconds_have_passed():
    clock = WorkClock()
    clock.seconds = 50.0
    deadline = Deadline(10.0, clock)
    earlier, share = deadline.earlier(4.0), deadline.at_share(0.3)
    clock.seconds = 53.0
    assert deadline.remaining_seconds == 7.0
    assert earlier.remaining_seconds == 3.0
    assert share.has_passed
    assert deadline.part(7).remaining_seconds == pytest.approx(1.0)
    clock.seconds = 61.0
    assert deadline.has_passed
    assert deadline.remaining_seconds == 0


def test_what_is_sampled_reserves_the_time_for_what_comes_later():
    clock = WorkClock()
    deadline = Deadline(10.0, clock).earlier(1.0, seconds_per_token=0.5)
    deadline.reserve_for(4)
    clock.seconds = 2.0
    assert deadline.remaining_seconds == 5.0
    deadline.reserve_for(10)
    assert deadline.has_passed
