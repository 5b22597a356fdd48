"""Summaries of our own measurements, against the library's own summaries of the same report."""

from dataclasses import replace

import pytest

from odp_callbacks.analysis.correlations import correlations
from odp_callbacks.analysis.study.figures import GAP, FigureKey, study_estimate
from odp_callbacks.analysis.study.report_summary import accuracy_summary, node_summary, update_summary
from odp_callbacks.analysis.summaries import SPLITS, summarise
from odp_callbacks.analysis.teacher_accuracy import teacher_accuracies
from odp_callbacks.records import ProbeReport, TeacherResponse
from tests.helpers.records import report_maker
from tests.helpers.updates import with_update

NAMES = "abcdef"
TEACHERS = ("Self-1C", "Self-1C1W", "control")


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    made = report_maker()(lambda correct, depth: (0.5 - 0.2 * correct, 0.1, 0.9), teachers=TEACHERS)
    return with_update(made, lambda correct: (0.5, 0.2 + 0.1 * correct, 0.9))


def test_update_gains_and_their_differences(report: ProbeReport) -> None:
    cell = update_summary(report, "small", "sums", NAMES)
    by_class = {(one.teacher, one.split): one.figures["update_gain"] for one in summarise(report)}
    for teacher in TEACHERS:
        for split in (*SPLITS, GAP):
            assert cell.figures[FigureKey("update_gain", teacher, split)].value == pytest.approx(
                by_class[teacher, split].value
            )
    mean = (by_class["Self-1C", "all"].value + by_class["Self-1C1W", "all"].value) / 2
    assert cell.figures[FigureKey("update_gain")].value == pytest.approx(mean)
    assert cell.figures[FigureKey("update_gain")].informative == {"sums": 6}
    assert set(cell.figures[FigureKey("update_gain")].left_out) == {f"sums/{name}" for name in NAMES}
    # The jackknife, without the correction for pairs of questions: never narrower, by a factor of at most √2.
    expected, found = by_class["Self-1C", "all"], study_estimate(cell.figures[FigureKey("update_gain", "Self-1C")])
    assert 0.9 * expected.half_width <= found.half_width <= 1.5 * expected.half_width


def test_groups_that_are_no_single_questions_keep_names_of_their_own(report: ProbeReport) -> None:
    rollouts = tuple(replace(rollout, pieces=rollout.pieces[:-1]) for rollout in report.rollouts)
    cell = update_summary(replace(report, rollouts=rollouts), "small", "sums", NAMES)
    assert "sums/group 0" in cell.figures[FigureKey("update_gain")].left_out


def test_figures_at_nodes_with_and_without_a_question(report: ProbeReport) -> None:
    cell = node_summary(report, "small", "sums", NAMES)
    nodes_only = replace(report, updates=())
    by_class = {(one.teacher, one.split): one.figures for one in summarise(nodes_only)}
    for figure in ("predicted_gain", "alignment", "teacher_advantage"):
        for split in SPLITS:
            found = cell.figures[FigureKey(figure, "Self-1C1W", split)]
            assert found.value == pytest.approx(by_class["Self-1C1W", split][figure].value)
    kept = replace(nodes_only, nodes=tuple(node for node in report.nodes if node.question != "2"))
    without = next(one for one in summarise(kept) if one.teacher == "Self-1C" and one.split == "all")
    left_out = cell.figures[FigureKey("predicted_gain", "Self-1C")].left_out
    assert left_out["sums/c"] == pytest.approx(without.figures["predicted_gain"].value)
    depth = correlations(nodes_only)["Self-1C", "depth"]
    assert cell.figures[FigureKey("correlation depth", "Self-1C")].value == pytest.approx(depth.value)


def test_accuracies_of_teachers_and_student(report: ProbeReport) -> None:
    responses = tuple(
        TeacherResponse(teacher, str(question), "", 0.0, (question + place) % 3 > 0, False)
        for question in range(6)
        for place, teacher in enumerate(TEACHERS)
    )
    report = replace(report, teacher_responses=responses)
    cell = accuracy_summary(report, "small", "sums", NAMES)
    for expected in teacher_accuracies(report):
        assert cell.figures[FigureKey("accuracy", expected.teacher)].value == pytest.approx(expected.accuracy.value)
    assert cell.figures[FigureKey("accuracy", "student")].value == 0.5
