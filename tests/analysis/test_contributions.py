"""Influences of a report as one table, and their sums by class and depth."""

from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.contributions import contributions, report_influence
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.storage import concatenate
from tests.helpers.records import MakeReport, split
from tests.helpers.updates import update_only, with_texts


def test_the_table_is_that_of_the_report_s_tokens(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.3, -0.2), noise=0.4)
    influence, table = report_influence(report, 0.9), report.tokens(0.9)
    assert influence is not None
    for index, teacher in enumerate(report.teachers):
        np.testing.assert_array_equal(influence.value[:, index], table[f"influence_{teacher}"])
        np.testing.assert_array_equal(influence.low[:, index], table[f"influence_{teacher}_low"])
    np.testing.assert_array_equal(influence.depth, table.depth)
    assert table[influence.tokens_of(3)].rollout.unique().tolist() == [3]


def test_contributions_of_classes_and_depths_add_up_to_the_update_s(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1), folds=6)
    influence = report_influence(report)
    assert influence is not None
    parts = contributions(report, influence)
    assert [(part.split, part.window) for part in parts] == [
        (name, window) for name in ("correct", "incorrect") for window in ("0", "1", "2-3", "4-7")
    ]
    assert sum(part.tokens for part in parts) == 12 * 8
    for summary in Analysis(report).summaries():
        if summary.split != "incorrect-correct":
            column = report.teachers.index(summary.teacher)
            total = sum(part.value[column] for part in parts if summary.split in ("all", part.split))
            assert total == pytest.approx(summary.figures["update_contribution"].value, rel=1e-5)


def test_several_measurements_weigh_as_much_as_their_questions(make_report: MakeReport) -> None:
    first = update_only(make_report(split, questions=6), lambda correct: (0.5, -0.4), folds=6)
    second = update_only(make_report(split, questions=3, first=6), lambda correct: (0.1, 0.4), folds=3)
    both = concatenate([first, second])
    assert len(both.updates) == 2
    influence = report_influence(both)
    assert influence is not None
    total = sum(part.value[0] for part in contributions(both, influence))
    assert total == pytest.approx(Analysis(both).summaries()[0].figures["update_contribution"].value, rel=1e-5)


def test_what_was_not_measured_is_nan_and_no_part(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.3, -0.2))
    assert report_influence(replace(report, updates=())) is None
    longer = with_texts(report, 20)
    influence = report_influence(longer)
    assert influence is not None
    assert np.isnan(influence.value[influence.tokens_of(0)][8:]).all()
    assert not influence.significant[influence.tokens_of(0)][8:].any()
    assert [part.window for part in contributions(longer, influence)] == ["0", "1", "2-3", "4-7"] * 2
    nothing = replace(report, rollouts=tuple(replace(rollout, pieces=()) for rollout in report.rollouts))
    (update,) = nothing.updates
    assert update.influence is not None
    empty = replace(
        update.influence,
        rollout=np.zeros(0, np.int64),
        depth=np.zeros(0, np.int64),
        by_fold=update.influence.by_fold[:, :0],
        logit_norm=update.influence.logit_norm[:0],
    )
    nothing = replace(nothing, updates=(replace(update, influence=empty),))
    influence = report_influence(nothing)
    assert influence is not None
    assert influence.scale == 1.0
    assert contributions(nothing, influence) == []
