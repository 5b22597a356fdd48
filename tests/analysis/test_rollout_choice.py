"""On which rollouts to distil, from classes and rules whose gains are known."""

from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.rollout_choice import UNDECIDED_CLASSES, UNDECIDED_WHOLE, choose_rollouts, class_shares
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.records import ProbeReport
from odp_callbacks.update_records import RuleProducts, UpdateRecord, gram_of_rows
from tests.helpers.records import report_maker
from tests.helpers.updates import update_only


def report_of(correct: float, incorrect: float, noise: float = 0.1) -> ProbeReport:
    short = report_maker()(lambda correct, depth: (0.1,), teachers=("near",), questions=12)
    return update_only(short, lambda is_correct: (correct if is_correct else incorrect,), noise=noise)


def with_rule(report: ProbeReport, keeps: float) -> ProbeReport:
    """The rule's direction is the whole one, of which it keeps that part of what is not along the success gradient."""

    def of_record(record: UpdateRecord) -> UpdateRecord:
        gram = record.gram
        cross, whole = gram.cross.sum(axis=3), gram.directions.sum(axis=(3, 4))
        # Along the mean success gradient the direction has its whole length, across it a part.
        along = cross.mean(axis=0)[None, :, :] * cross.mean(axis=0)[:, None, :] / gram.success.mean()
        across = whole - along
        rules = RuleProducts(
            ("sharp",),
            np.ones((1, 1)),
            np.ones((1, gram.groups, 1)),
            cross[None],
            (along + keeps**2 * across)[None],
            (along + keeps * across)[None],
        )
        return replace(record, rules=rules)

    return replace(report, updates=tuple(of_record(update) for update in report.updates))


def test_where_both_classes_help_alike_all_are_kept_and_the_loss_is_named() -> None:
    report = report_of(0.5, 0.5)
    choice, shares = choose_rollouts(Analysis(report), "near"), class_shares(Analysis(report), 0)
    assert choice.where == "on all rollouts"
    assert choice.growth == 1
    assert sum(share.value for share in shares.values()) == pytest.approx(1)
    lost = shares["correct"]
    assert choice.reason.startswith("leaving out ")
    assert f"would lose {lost.value:.0%} of the gain ({lost.low:.0%} to {lost.high:.0%})" in choice.reason


def test_a_class_that_alone_gains_more_is_chosen() -> None:
    choice = choose_rollouts(Analysis(report_of(0.0, 0.7)), "near")
    assert choice.where == "on incorrect rollouts only"
    assert "a step of the same length gains" in choice.reason
    assert choose_rollouts(Analysis(report_of(0.7, -0.2)), "near").where == "on correct rollouts only"


def test_a_class_that_takes_away_is_left_out() -> None:
    """The noise hides which update gains more, but not that one class's part lies below 0."""
    shares = class_shares(Analysis(report_of(-0.2, 0.8)), 0)
    assert shares["correct"].high < 0 < shares["incorrect"].low
    assert choose_rollouts(Analysis(report_of(-0.2, 0.8)), "near").where == "on incorrect rollouts only"


def test_what_a_class_adds_can_be_undecided() -> None:
    """Directions of correct rollouts point now along the success gradient and now against it."""
    success = np.eye(1, 3).repeat(12, axis=0)
    directions = np.zeros((12, 1, 2, 3))
    directions[:, 0, 0, 0] = np.where(np.arange(12) % 2, -0.9, 1.0)
    directions[:, 0, 1] = [[1.0, 0.0, 0.5], [1.0, 0.5, 0.0]] * 6
    record = UpdateRecord(gram_of_rows(np.ones(12), np.ones((12, 2)), success, directions))
    analysis = Analysis(replace(report_of(0.5, 0.5), nodes=(), updates=(record,)))
    share = class_shares(analysis, 0)["correct"]
    assert share.low < 0 < share.high
    choice = choose_rollouts(analysis, "near")
    assert choice.where == "on all rollouts"
    assert choice.reason == (
        "whether leaving out correct rollouts would lose anything is undecided "
        f"({share.low:.0%} to {share.high:.0%} of the gain)"
    )
    assert choice.growth > 1


def test_without_a_decided_whole_there_are_no_shares() -> None:
    analysis = Analysis(report_of(0.02, 0.02, noise=1.0))
    shares = class_shares(analysis, 0)
    assert {share.note for share in shares.values()} == {UNDECIDED_WHOLE}
    assert all(np.isnan(share.value) for share in shares.values())
    assert choose_rollouts(analysis, "near").reason == UNDECIDED_CLASSES


def test_a_measured_rule_that_gains_more_is_recommended() -> None:
    choice = choose_rollouts(Analysis(with_rule(report_of(0.4, 0.4), keeps=0.3)), "near")
    assert choice.where == "with the rule “sharp”"
    assert "gains" in choice.reason


def test_a_measured_rule_that_gains_nothing_more_is_said_to() -> None:
    choice = choose_rollouts(Analysis(with_rule(report_of(0.4, 0.4), keeps=1.0)), "near")
    assert choice.where == "on all rollouts"
    assert choice.reason.endswith("; the measured rule does not gain measurably more")


def test_comparisons_hold_together() -> None:
    """With more alternatives each needs a longer interval."""
    report = report_of(0.4, 0.4)
    lone = with_rule(report, keeps=0.3)
    (record,) = lone.updates
    assert record.rules is not None
    many = replace(
        record.rules,
        names=("sharp", *(f"whole {index}" for index in range(7))),
        weight=np.ones((8, 1)),
        tokens=np.ones((8, record.gram.groups, 1)),
        cross=np.concatenate([record.rules.cross] * 8),
        own=np.concatenate([record.rules.own] * 8),
        whole=np.concatenate([record.rules.whole] * 8),
    )
    crowded = replace(lone, updates=(replace(record, rules=many),))
    few, more = (choose_rollouts(Analysis(one), "near").reason for one in (lone, crowded))
    assert few != more
    assert few.split("(")[0] == more.split("(")[0], "the same estimate"


def test_without_an_update_single_tokens_tell() -> None:
    report = report_maker()(lambda correct, depth: (-0.4 if correct else 0.5,), teachers=("near",))
    choice = choose_rollouts(Analysis(report), "near")
    assert choice == choose_rollouts(Analysis(report, 0.9), "near")
    assert (choice.where, choice.reason) == ("on incorrect rollouts only", "it harms on correct ones")
