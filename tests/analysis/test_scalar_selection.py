"""Which scalars are logged: how many by default, and what `log` adds."""

import math
from typing import Any

import pytest

from odp_callbacks.analysis.scalar_selection import ScalarSelection, check_log
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.callbacks.pooled_updates import PooledUpdates
from tests.helpers.records import many_teachers
from tests.helpers.updates import with_update

TEACHERS = ("answer", "solution", "{braces}")


def test_three_teachers_have_forty_main_scalars() -> None:
    names = ScalarSelection(TEACHERS).columns()
    assert len(names) == len(set(names)) == 40
    assert names[:2] == ["odp/update_gain/answer/all", "odp/update_gain/solution/all"]
    assert "odp/update_gain_low/{braces}/incorrect-correct" in names
    assert len(ScalarSelection(TEACHERS).columns(gate=True)) == 46


def test_the_main_scalars_of_a_probe_are_those_that_were_announced() -> None:
    """Columns of a table are named before the first probe, and no other may come with it."""
    report = with_update(many_teachers(3), lambda correct: (0.1,) * 3)
    metrics = {**scalars(report), **PooledUpdates(0.9, 0.95).observe(report), "odp/probe/time_share": 0.1}
    selection = ScalarSelection(report.teachers)
    assert len(metrics) > 500
    assert set(selection.selected(metrics)) == set(selection.columns(steps=False))
    without_update = ScalarSelection(report.teachers, gain="predicted_gain")
    assert set(without_update.selected(metrics)) == set(without_update.columns(steps=False))


def test_what_log_adds() -> None:
    metrics = {"odp/alignment/answer/all": 0.1, "odp/alignment_low/answer/all": math.nan, "odp/probe/seconds": 3.0}
    assert ScalarSelection(TEACHERS).selected(metrics) == {}
    assert ScalarSelection(TEACHERS, ("alignment",)).numbers(metrics) == {"odp/alignment/answer/all": 0.1}
    assert len(ScalarSelection(TEACHERS, ("alignment",)).selected(metrics)) == 2
    assert len(ScalarSelection(TEACHERS, "all").selected(metrics)) == 3
    assert ScalarSelection(TEACHERS).numbers(metrics, ["odp/probe/seconds"]) == {"odp/probe/seconds": 3.0}
    assert ScalarSelection(TEACHERS, ("alignment", "alinment")).without_match(metrics) == ["alinment"]


def test_a_gate_logs_its_classes_but_not_each_window_of_depths() -> None:
    metrics = {"odp/gate/answer/correct": 1.0, "odp/gate/answer/correct depth 4-7": 0.0, "threshold": 0.5}
    assert list(ScalarSelection(TEACHERS).selected(metrics)) == ["odp/gate/answer/correct", "threshold"]
    assert len(ScalarSelection(TEACHERS, ("gate",)).selected(metrics)) == 3


@pytest.mark.parametrize("log", ["everything", 3, None, [""], [1], {"alignment": True}])
def test_other_values_are_refused(log: Any) -> None:
    with pytest.raises(ValueError, match=r"`log` must be 'main', 'all', or a list .* was given"):
        check_log(log)


def test_names_may_be_given_in_full() -> None:
    assert check_log(["odp/alignment", "probe"]) == ("alignment", "probe")
