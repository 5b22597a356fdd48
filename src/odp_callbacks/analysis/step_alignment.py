"""Step alignment: the cosine of the summed gradients, which is what an optimizer step would follow."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import ALIGNMENT_BOUNDS, questions_of, undefined_figure
from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.jackknife import Estimator
from odp_callbacks.records import Floats, ProbeReport, StepSums

FIRST_HALF, SECOND_HALF, FIRST_TEACHER = 0, 1, 2
"""Positions of the vectors of :class:`~odp_callbacks.records.StepSums`: two ideal gradients, then the teachers."""


def step_alignment(report: ProbeReport, evidence: Evidence, teacher_index: int, chosen: NDArray[np.bool_]) -> Estimator:
    """Cosine of the summed ideal gradient with the summed distillation gradient of one teacher.

    The squared norm of the summed ideal gradient is the inner product of its estimates from two disjoint halves of the
    continuations, whose noise is independent. The uncorrected cosine uses the norm of their mean.

    Args:
        report: A probe's report; its step sums may be missing.
        evidence: Of the report's nodes.
        teacher_index: Index of the teacher.
        chosen: ``(N,)`` bool, nodes of the class; sums exist only for all nodes, correct ones and incorrect ones.
    """
    questions, node_count = questions_of(evidence, chosen), int(chosen.sum())
    if report.step is None:
        return Estimator(undefined_figure, questions, node_count, withheld="not measured")
    correctness = set(evidence.correct[chosen].tolist())
    if not (chosen == np.isin(evidence.correct, list(correctness))).all():
        return Estimator(undefined_figure, questions, node_count, withheld="of correct and incorrect only")
    products = _ClassProducts(report.step, [node.question for node in report.nodes], correctness)
    teacher = FIRST_TEACHER + teacher_index

    def cosine(weights: Floats, ideal_square: Floats) -> Floats:
        inner = (products(weights, FIRST_HALF, teacher) + products(weights, SECOND_HALF, teacher)) / 2
        norm_square = ideal_square * products(weights, teacher, teacher)
        blank = np.full(norm_square.shape, np.nan)
        ratio: Floats = np.divide(inner, np.sqrt(norm_square.clip(min=0)), out=blank, where=norm_square > 0)
        return ratio

    def corrected_cosine(weights: Floats) -> Floats:
        return cosine(weights, products(weights, FIRST_HALF, SECOND_HALF))

    all_questions = np.ones(len(questions))
    mean_square = (
        products(all_questions, FIRST_HALF, FIRST_HALF)
        + products(all_questions, SECOND_HALF, SECOND_HALF)
        + 2 * products(all_questions, FIRST_HALF, SECOND_HALF)
    ) / 4
    uncorrected = float(cosine(all_questions, mean_square))
    return Estimator(corrected_cosine, questions, node_count, uncorrected=uncorrected, bounds=ALIGNMENT_BOUNDS)


class _ClassProducts:
    """Inner products of the summed vectors of one class, for weighted questions.

    Args:
        step: Sums of ``G`` groups.
        node_questions: Question of each node, which gives the questions their numbers.
        correctness: Whether groups of correct rollouts, of incorrect ones or both belong to the class.
    """

    def __init__(self, step: StepSums, node_questions: Sequence[str], correctness: set[bool]) -> None:
        numbers = {question: number for number, question in enumerate(dict.fromkeys(node_questions))}
        self.gram = step.gram
        self.group_question = np.array([numbers[question] for question in step.question], dtype=np.int64)
        self.in_class = np.array([correct in correctness for correct in step.correct], dtype=float)

    def __call__(self, weights: Floats, first: int, second: int) -> Floats:
        """Inner product of two summed vectors, for question weights ``(..., m)``: ``(...)``."""
        group_weights = weights[..., self.group_question] * self.in_class
        gram = self.gram[:, first, :, second]
        product: Floats = np.einsum("...g,gh,...h->...", group_weights, gram, group_weights)
        return product
