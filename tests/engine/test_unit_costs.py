"""Which questions are measured when there is no time for all."""

from itertools import permutations

import pytest

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.unit_costs import SLACK_SHARE, UnitCosts, questions_in_time
from tests.helpers.clocks import WorkClock

WORK = [1.0, 5.0, 2.0, 1.0, 3.0]
OUTCOMES = [0.1, 1.0, 0.3, 0.0, 0.6]
"""Long questions have large outcomes."""


def measured(order, seconds):
    """The questions that there is time for, if each takes what was expected."""
    clock = WorkClock()
    costs, deadline = UnitCosts({"update": 1.0}, {"update": 1.0}), Deadline(seconds, clock)
    done = []
    for part in questions_in_time(WORK, order, "update", costs, deadline):
        clock.seconds += sum(WORK[question] for question in part)
        done += part
    return done, clock.seconds


def greedy(order, seconds):
    """A rule that asks whether there is time for the next question."""
    done, taken = [], 0.0
    for question in order:
        if taken + WORK[question] > seconds:
            break
        taken += WORK[question]
        done.append(question)
    return done


def excess(order, done):
    """Sum over the measured questions of the outcome less the mean of those that were left when it was drawn."""
    left, total = list(order), 0.0
    for question in done:
        total += OUTCOMES[question] - sum(OUTCOMES[one] for one in left) / len(left)
        left.remove(question)
    return total


@pytest.mark.parametrize("seconds", [6.0, 7.0, 9.0, 11.0, 12.0])
def test_which_questions_are_left_out_does_not_depend_on_what_they_are(seconds):
    """Over all orders, a measured question is on average like those that it was drawn from. The greedy rule differs."""
    orders = list(permutations(range(len(WORK))))
    chosen = [measured(order, seconds)[0] for order in orders]
    assert any(0 < len(done) < len(WORK) for done in chosen) or seconds == 12.0
    assert sum(excess(*pair) for pair in zip(orders, chosen, strict=True)) == pytest.approx(0, abs=1e-9)


def test_a_rule_that_asks_for_the_next_question_prefers_short_ones():
    orders = list(permutations(range(len(WORK))))
    assert sum(excess(order, greedy(order, 7.0)) for order in orders) / len(orders) < -0.05


def test_the_deadline_is_kept_whatever_the_order():
    assert max(measured(order, 7.0)[1] for order in permutations(range(len(WORK)))) <= 7.0 * (1 + SLACK_SHARE)


def test_without_a_deadline_all_questions_come_at_once():
    assert list(questions_in_time(WORK, [2, 0, 1, 4, 3], "update", UnitCosts(), Deadline())) == [[2, 0, 1, 4, 3]]


def test_short_questions_are_measured_together():
    costs, deadline = UnitCosts({"update": 1.0}, {"update": 1.0}), Deadline(100.0, WorkClock())
    parts = list(questions_in_time([1.0] * 12, range(12), "update", costs, deadline))
    assert len(parts[0]) == 5, "a twentieth of the time"


def test_recent_units_count_more():
    costs = UnitCosts()
    costs.record("update", 10.0, 10.0)
    costs.record("update", 10.0, 40.0)
    assert costs.predict("update", 1.0) == pytest.approx(45 / 15)
    assert costs.predict("rules", 1.0) == 0
