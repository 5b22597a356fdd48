"""The teachers' own accuracy."""

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.teacher_accuracy import ALL_ALIKE, student_accuracy, teacher_accuracies
from odp_callbacks.records import ProbeReport, RolloutRecord, TeacherResponse
from odp_callbacks.storage import concatenate, load, save

GENERATOR = np.random.default_rng(3)
STUDENT = GENERATOR.random((8, 4)) < 0.4
TEACHER = GENERATOR.random((8, 4)) < 0.7


def report_of(student: np.ndarray, teacher: np.ndarray, name: str = "hint") -> ProbeReport:
    rollouts = tuple(
        RolloutRecord(str(question), "", (), "", float(correct), bool(correct), False)
        for question, row in enumerate(student)
        for correct in row
    )
    responses = tuple(
        TeacherResponse(name, str(question), "text", float(correct), bool(correct), question == 0)
        for question, row in enumerate(teacher)
        for correct in row
    )
    return ProbeReport((name, "silent"), (), rollouts, (), {}, 0, 0, {}, teacher_responses=responses)


def interval(per_question: np.ndarray) -> tuple[float, float, float]:
    """Mean and interval of independent questions by Student's t."""
    error = per_question.std(ddof=1) / np.sqrt(len(per_question))
    half = stats.t.ppf(0.975, len(per_question) - 1) * error
    return per_question.mean(), per_question.mean() - half, per_question.mean() + half


def test_shares_have_the_interval_of_a_mean_over_questions() -> None:
    (hint,) = teacher_accuracies(report_of(STUDENT, TEACHER))
    for estimate, per_question in (
        (hint.accuracy, TEACHER.mean(1)),
        (hint.above_student, TEACHER.mean(1) - STUDENT.mean(1)),
        (student_accuracy(report_of(STUDENT, TEACHER)), STUDENT.mean(1)),
    ):
        value, low, high = interval(per_question)
        assert estimate.value == pytest.approx(value)
        assert estimate.high == pytest.approx(min(high, 1.0))
        # A paired difference may take the fewer degrees of freedom of Welch and Satterthwaite.
        assert estimate.low <= low + 1e-12
        assert estimate.questions == 8
    assert (hint.teacher, hint.responses, hint.truncated) == ("hint", 32, 4)


def test_the_difference_is_of_the_questions_that_both_answered() -> None:
    (hint,) = teacher_accuracies(report_of(STUDENT, TEACHER[:5]))
    assert hint.above_student.value == pytest.approx(TEACHER[:5].mean() - STUDENT[:5].mean())
    assert hint.above_student.questions == 5


def test_without_spread_there_is_no_interval() -> None:
    (hint,) = teacher_accuracies(report_of(STUDENT, np.ones((8, 4), bool)))
    assert (hint.accuracy.value, hint.accuracy.note) == (1.0, ALL_ALIKE)
    assert np.isnan(hint.accuracy.low)
    assert np.isfinite(hint.above_student.low)
    assert teacher_accuracies(ProbeReport(("hint",), (), (), (), {}, 0, 0, {})) == []


def test_the_responses_are_kept_in_the_records(tmp_path: object) -> None:
    report = report_of(STUDENT, TEACHER)
    assert load(save(report, f"{tmp_path}/records")).teacher_responses == report.teacher_responses
    assert len(concatenate([report, report]).teacher_responses) == 64
    without = ProbeReport(("hint",), (), (), (), {}, 0, 0, {})
    assert load(save(without, f"{tmp_path}/without")).teacher_responses == ()
