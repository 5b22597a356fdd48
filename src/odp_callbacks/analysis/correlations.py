"""Correlation of the alignment with the divergences and entropies of teacher and student."""

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import ALIGNMENT_BOUNDS, questions_of, undefined_figure
from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.node_estimates import DEFINED, statuses
from odp_callbacks.analysis.summaries import PREDICTORS
from odp_callbacks.records import Floats, ProbeReport


def correlations(report: ProbeReport, confidence: float = 0.95) -> dict[tuple[str, str], Estimate]:
    """Pearson correlation of alignment and each predictor over the nodes whose alignment is defined.

    arXiv:2605.10889 reports Spearman correlations within a path; Pearson's over all nodes is ours.

    Args:
        report: A probe's report.
        confidence: Level of the intervals, in (0, 1); they are clustered by question.

    Returns:
        Correlations by (teacher, predictor); NaN with fewer than three nodes, or where one of the two does not vary.
    """
    evidence = gather(report.nodes, teachers=len(report.teachers))
    cosine, status = evidence.cosine, statuses(evidence)
    estimates = {}
    for teacher_index, teacher in enumerate(report.teachers):
        defined = status[:, teacher_index] == DEFINED
        alignment = np.where(defined, cosine[:, teacher_index], 0)
        for predictor_name in PREDICTORS:
            predictor_values = np.array([node.predictors[predictor_name][teacher_index] for node in report.nodes])
            estimator = _pearson(evidence, alignment, predictor_values, defined)
            estimates[teacher, predictor_name] = jackknife(estimator, confidence)
    return estimates


def _pearson(evidence: Evidence, first: Floats, second: Floats, chosen: NDArray[np.bool_]) -> Estimator:
    """Pearson correlation of two columns ``(N,)`` over the chosen nodes."""
    questions, node_count = questions_of(evidence, chosen), int(chosen.sum())
    if node_count < 3 or np.ptp(first[chosen]) == 0 or np.ptp(second[chosen]) == 0:
        withheld = "no difference" if node_count else ""
        return Estimator(undefined_figure, questions, node_count, withheld=withheld)
    # Centred columns keep their precision in the differences of sums below.
    first, second = first - first[chosen].mean(), second - second[chosen].mean()
    moments = [np.ones_like(first), first, second, first * first, second * second, first * second]
    question_sums = np.zeros((len(questions), len(moments)))
    # Each node counts once, and for the nodes without gradients that it stands for.
    weighted = evidence.gradient_weight[:, None] * np.stack(moments, axis=1)
    np.add.at(question_sums, evidence.question[chosen], weighted[chosen])

    def correlation(weights: Floats) -> Floats:
        total_weight, sum_first, sum_second, sum_first_square, sum_second_square, sum_product = np.moveaxis(
            weights @ question_sums, -1, 0
        )
        spread: Floats = np.sqrt(
            (total_weight * sum_first_square - sum_first * sum_first)
            * (total_weight * sum_second_square - sum_second * sum_second)
        )
        return np.asarray((total_weight * sum_product - sum_first * sum_second) / spread)

    return Estimator(correlation, questions, node_count, bounds=ALIGNMENT_BOUNDS)
