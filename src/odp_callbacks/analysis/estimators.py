"""The figures of a set of nodes before they get intervals: predicted gain, gain-weighted alignment, token mean."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.jackknife import Estimate, Estimator, jackknife
from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED, statuses
from odp_callbacks.analysis.noise_correction import (
    MINIMUM_CONTINUATIONS,
    MINIMUM_RELIABILITY,
    NoiseCorrection,
    correct_for_noise,
)
from odp_callbacks.records import Floats, ProbeReport

ALIGNMENT_BOUNDS = (-1.0, 1.0)
SLOPE_RIDGE = 0.02
"""Ridge penalty on the slope of the noise correction, relative to the sum of squares for its level.

It keeps the slope near 0 where all ideal gradients have about the same norm, which would leave it undetermined.
"""


def questions_of(evidence: Evidence, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell which questions have a chosen node, ``(m,)`` bool for nodes chosen by the mask ``(N,)``."""
    return np.bincount(evidence.question[chosen], minlength=_question_count(evidence)) > 0


def _question_count(evidence: Evidence) -> int:
    return int(evidence.question.max(initial=-1)) + 1


def _sums_by_question(evidence: Evidence, columns: Sequence[Floats], chosen: NDArray[np.bool_]) -> Floats:
    """Token-weighted sums of ``D`` columns ``(N,)`` over the chosen nodes of each question, ``(m, D)``."""
    questions, token_weights = evidence.question[chosen], evidence.token_weight[chosen]
    question_count = _question_count(evidence)
    return np.stack(
        [np.bincount(questions, token_weights * column[chosen], minlength=question_count) for column in columns], axis=1
    )


def _ratio_of_sums(
    evidence: Evidence,
    numerator: Floats,
    denominator: Floats,
    chosen: NDArray[np.bool_],
    withheld: str,
    uncorrected: float = float("nan"),
    bounds: tuple[float, float] | None = None,
) -> Estimator:
    """Token-weighted sum of one column ``(N,)`` over that of another."""
    question_sums = _sums_by_question(evidence, [numerator, denominator], chosen)

    def ratio(weights: Floats) -> Floats:
        total = weights @ question_sums
        return np.asarray(total[..., 0] / total[..., 1])

    return Estimator(ratio, questions_of(evidence, chosen), int(chosen.sum()), uncorrected, withheld, bounds)


def token_mean(evidence: Evidence, values: Floats, chosen: NDArray[np.bool_], withheld: str = "") -> Estimator:
    """Mean over tokens: nodes are weighted by their inverse inclusion probabilities.

    Args:
        evidence: ``N`` nodes.
        values: ``(N,)``; NaN values are left out.
        chosen: ``(N,)`` bool, nodes to average over.
        withheld: Why the mean is not to be reported, if so.
    """
    chosen = chosen & ~np.isnan(values)
    return _ratio_of_sums(evidence, np.nan_to_num(values), np.ones_like(values), chosen, withheld)


def gradient_figures(
    evidence: Evidence,
    correction: NoiseCorrection,
    teacher_index: int,
    chosen: NDArray[np.bool_],
    status: NDArray[np.str_],
) -> dict[str, Estimator]:
    """Predicted gain, gain-weighted alignment and token-mean alignment of one teacher.

    Args:
        evidence: ``N`` nodes.
        correction: Of the same nodes, for the two alignments; predicted gain is unbiased without a correction.
        teacher_index: Index of the teacher.
        chosen: ``(N,)`` bool, nodes of the class.
        status: ``(N,)``, of each node's alignment with this teacher.

    Returns:
        The figures ``predicted_gain``, ``gain_weighted_alignment`` and ``alignment``.
    """
    gain = evidence.weighted_gain[:, teacher_index]
    has_gain = chosen & ~np.isnan(gain)
    nonzero = has_gain & (evidence.teacher_norm[:, teacher_index] > 0)
    # Where success differs at no node of the class, every gain is 0: an interval of length 0 would claim knowledge.
    success_differs = bool(evidence.differs[chosen].any())
    no_difference = "no difference" if chosen.any() and not success_differs else ""
    no_gradient = "no gradient" if has_gain.any() and not nonzero.any() else ""
    # The nodes that are left would say that where outcomes differ, nothing is gained.
    failed = "gradients failed" if np.isnan(evidence.gradient_weight[chosen]).any() else ""
    no_difference, no_gradient = failed or no_difference, failed or no_gradient
    norm_weight = evidence.token_weight * correction.norm
    with np.errstate(divide="ignore", invalid="ignore"):
        token_weight = evidence.token_weight
        total_gain = (token_weight * np.nan_to_num(gain))[has_gain].sum()
        total_norm = (token_weight * evidence.weighted_norm)[has_gain].sum()
        uncorrected = float("nan") if failed else float(total_gain / total_norm)
    return {
        "predicted_gain": token_mean(evidence, gain, chosen, no_difference),
        "gain_weighted_alignment": _ratio_of_sums(
            evidence,
            np.nan_to_num(gain),
            correction.norm,
            has_gain,
            no_difference or no_gradient or _too_noisy(norm_weight, correction, has_gain),
            uncorrected=uncorrected,
            bounds=ALIGNMENT_BOUNDS,
        ),
        "alignment": _mean_alignment(
            evidence, correction, teacher_index, nonzero & (status != UNDEFINED), status, no_difference or no_gradient
        ),
    }


def _mean_alignment(
    evidence: Evidence,
    correction: NoiseCorrection,
    teacher_index: int,
    measured: NDArray[np.bool_],
    status: NDArray[np.str_],
    withheld: str,
) -> Estimator:
    """Token mean of the alignment, corrected for noise by the regression of :class:`NoiseCorrection`."""
    cosine = evidence.cosine[:, teacher_index]
    defined = measured & (status == DEFINED)
    # Nodes with gradients stand for those without.
    gradient_weight = evidence.gradient_weight
    sample_weight = evidence.token_weight * gradient_weight
    uncorrected = float("nan")
    if defined.any():
        uncorrected = float(np.average(cosine[defined], weights=sample_weight[defined]))
    cosine = np.nan_to_num(cosine)
    reliability, tilted = correction.reliability, correction.tilted
    columns = [
        np.ones_like(cosine),
        correction.size,
        gradient_weight * reliability * reliability,
        gradient_weight * reliability * tilted,
        gradient_weight * tilted * tilted,
        gradient_weight * reliability * cosine,
        gradient_weight * tilted * cosine,
    ]
    question_sums = _sums_by_question(evidence, columns, measured)
    return Estimator(
        lambda weights: _mean_from_regression(weights @ question_sums),
        questions_of(evidence, measured),
        int(measured.sum()),
        uncorrected=uncorrected,
        withheld=withheld or _too_noisy(sample_weight, correction, measured),
        bounds=ALIGNMENT_BOUNDS,
    )


def _mean_from_regression(sums: Floats) -> Floats:
    """Mean true cosine from the sums of its regression on reliability and tilt, ``(..., 7)`` to ``(...)``."""
    (
        total_weight,
        total_size,
        reliability_square,
        reliability_tilt,
        tilt_square,
        reliability_cosine,
        tilt_cosine,
    ) = np.moveaxis(sums, -1, 0)
    tilt_square = tilt_square + SLOPE_RIDGE * reliability_square
    determinant = reliability_square * tilt_square - reliability_tilt * reliability_tilt
    level = (reliability_cosine * tilt_square - tilt_cosine * reliability_tilt) / determinant
    slope = (reliability_square * tilt_cosine - reliability_tilt * reliability_cosine) / determinant
    mean: Floats = level + slope * total_size / total_weight
    return mean


def _too_noisy(weight: Floats, correction: NoiseCorrection, chosen: NDArray[np.bool_]) -> str:
    """Why a corrected figure of the chosen nodes, weighted by ``weight`` ``(N,)``, is withheld; empty if it is not."""
    weight = weight[chosen]
    if not weight.sum() > 0:
        return ""
    # Harmonic mean of the continuations a branch.
    effective = weight.sum() / max(float((weight / correction.effective[chosen]).sum()), 1e-300)
    if effective < MINIMUM_CONTINUATIONS * (1 - 1e-9):
        return "few continuations"
    reliability = np.average(correction.reliability[chosen], weights=weight)
    return "too noisy" if reliability < MINIMUM_RELIABILITY else ""


def half_width(evidence: Evidence, figure: str, confidence: float = 0.95) -> float:
    """Largest half-width of a figure's interval among the teachers, over all nodes.

    Args:
        evidence: ``N`` nodes.
        figure: ``"predicted_gain"``, ``"gain_weighted_alignment"`` or ``"alignment"``.
        confidence: Level of the intervals, in (0, 1).

    Returns:
        The half-width; infinite where a teacher has no interval.
    """
    correction, status = correct_for_noise(evidence), statuses(evidence)
    all_nodes = np.ones(len(evidence.correct), bool)
    half_widths = []
    for teacher_index in range(evidence.teacher_norm.shape[1]):
        figures = gradient_figures(evidence, correction, teacher_index, all_nodes, status[:, teacher_index])
        half_widths.append(jackknife(figures[figure], confidence).half_width)
    return max((np.inf if np.isnan(width) else width for width in half_widths), default=np.inf)


def success_rate(report: ProbeReport, confidence: float = 0.95) -> Estimate:
    """Mean reward of the rollouts, with an interval clustered by question.

    Args:
        report: A probe's report.
        confidence: Level of the interval, in (0, 1).
    """
    questions, question_index = np.unique([rollout.question for rollout in report.rollouts], return_inverse=True)
    question_sums = np.zeros((len(questions), 2))
    rewards = [(rollout.reward, 1.0) for rollout in report.rollouts] or np.zeros((0, 2))
    np.add.at(question_sums, question_index, rewards)

    def mean_reward(weights: Floats) -> Floats:
        total = weights @ question_sums
        return np.asarray(total[..., 0] / total[..., 1])

    has_rollouts = np.ones(len(questions), bool)
    # Rewards that a training gave may have any range.
    is_share = all(0 <= rollout.reward <= 1 for rollout in report.rollouts)
    bounds = (0.0, 1.0) if is_share else None
    return jackknife(Estimator(mean_reward, has_rollouts, len(report.rollouts), bounds=bounds), confidence)


def undefined_figure(weights: Floats) -> Floats:
    """NaN for every row of question weights ``(..., m)``: the statistic of a figure that cannot be computed."""
    return np.full(weights.shape[:-1], np.nan)
