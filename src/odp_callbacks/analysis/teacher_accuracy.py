"""How often each teacher answers correctly by itself, under its own context, beside the student.

Whether a teacher answers well and whether distilling from it helps are two questions; arXiv:2605.10889 tabulates both
(its Tables 8 and 9).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.records import Floats, ProbeReport

ALL_ALIKE = "all alike"
"""Why there is no interval: all questions have the same share of correct responses, so the jackknife sees no spread."""


@dataclass(frozen=True)
class TeacherAccuracy:
    """How often a teacher answers correctly.

    Attributes:
        teacher: Name of the teacher.
        accuracy: Share of its responses that are correct, with an interval clustered by question.
        above_student: The same minus the student's, on the questions that both answered.
        responses: Number of its responses.
        truncated: How many of them the length limit cut.
    """

    teacher: str
    accuracy: Estimate
    above_student: Estimate
    responses: int
    truncated: int


def student_accuracy(report: ProbeReport, confidence: float = 0.95) -> Estimate:
    """Share of the student's rollouts that are correct, with an interval clustered by question.

    Args:
        report: A probe's report.
        confidence: Level of the interval, in (0, 1).
    """
    counts = _counts(report, [(rollout.question, rollout.correct) for rollout in report.rollouts])
    return _estimate(_share(counts), confidence)


def teacher_accuracies(report: ProbeReport, confidence: float = 0.95) -> list[TeacherAccuracy]:
    """How often each teacher answers correctly; empty if the teachers' responses were not sampled.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1).

    Examples:
        >>> from odp_callbacks.records import ProbeReport, RolloutRecord, TeacherResponse
        >>> rollouts = tuple(RolloutRecord(name, "", (), "", 0.0, name == "a", False) for name in "abcd")
        >>> answers = tuple(TeacherResponse("hint", name, "", 0.0, name != "d", False) for name in "abcd")
        >>> report = ProbeReport(("hint",), (), rollouts, (), {}, 0, 0, {}, teacher_responses=answers)
        >>> hint = teacher_accuracies(report)[0]
        >>> hint.accuracy.value, hint.above_student.value
        (0.75, 0.5)
    """
    student = _counts(report, [(rollout.question, rollout.correct) for rollout in report.rollouts])
    accuracies = []
    for teacher in report.teachers:
        responses = [response for response in report.teacher_responses if response.teacher == teacher]
        if not responses:
            continue
        counts = _counts(report, [(response.question, response.correct) for response in responses])
        by_both = (counts[:, 1:] > 0) & (student[:, 1:] > 0)
        accuracies.append(
            TeacherAccuracy(
                teacher,
                _estimate(_share(counts), confidence),
                _estimate(_share(counts * by_both) - _share(student * by_both), confidence),
                len(responses),
                sum(response.truncated for response in responses),
            )
        )
    return accuracies


def _counts(report: ProbeReport, outcomes: Sequence[tuple[str, bool]]) -> Floats:
    """Number of correct responses and of all responses by question, ``(m, 2)``, in an order common to all teachers."""
    asked = {rollout.question for rollout in report.rollouts}
    questions = sorted(asked | {response.question for response in report.teacher_responses})
    place = {question: index for index, question in enumerate(questions)}
    counts = np.zeros((len(questions), 2))
    for question, correct in outcomes:
        counts[place[question]] += (correct, 1.0)
    return counts


def _share(counts: Floats) -> Estimator:
    """The share of correct responses."""

    def share(weights: Floats) -> Floats:
        totals = weights @ counts
        return np.asarray(totals[..., 0] / totals[..., 1])

    return Estimator(share, counts[:, 1] > 0, int(counts[:, 1].sum()), bounds=(0.0, 1.0))


def _estimate(estimator: Estimator, confidence: float) -> Estimate:
    estimate = jackknife(estimator, confidence)
    if estimate.low == estimate.high:
        return replace(estimate, low=float("nan"), high=float("nan"), note=ALL_ALIKE)
    return estimate
