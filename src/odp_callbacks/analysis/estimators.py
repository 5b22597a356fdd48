"""The figures of a set of nodes, before their intervals: predicted gain, gain-weighted alignment, token mean."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.jackknife import Estimator, jackknife
from odp_callbacks.analysis.node_estimates import DEFINED, UNDEFINED, statuses
from odp_callbacks.analysis.noise_correction import LEAST_CONTINUATIONS, LEAST_RELIABILITY, NoiseCorrection
from odp_callbacks.records import Floats

RANGE = (-1.0, 1.0)
RIDGE = 0.02
"""Of the slope in the correction, relative to its level: where all nodes have one size there is no slope to tell."""


def questions_of(evidence: Evidence, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which questions have a chosen node, ``(m,)``."""
    m = int(evidence.question.max(initial=-1)) + 1
    return np.bincount(evidence.question[chosen], minlength=m) > 0


def _sums(evidence: Evidence, columns: Sequence[Floats], chosen: NDArray[np.bool_]) -> Floats:
    """Token-weighted sums of columns ``(N,)`` over the chosen nodes of each question: ``(m, D)``."""
    m = int(evidence.question.max(initial=-1)) + 1
    index, weight = evidence.question[chosen], evidence.token_weight[chosen]
    return np.stack([np.bincount(index, weight * column[chosen], minlength=m) for column in columns], axis=1)


def _ratio(
    evidence: Evidence,
    top: Floats,
    bottom: Floats,
    chosen: NDArray[np.bool_],
    withheld: str,
    uncorrected: float = float("nan"),
    ends: tuple[float, float] | None = None,
) -> Estimator:
    sums = _sums(evidence, [top, bottom], chosen)

    def function(weights: Floats) -> Floats:
        total = weights @ sums
        ratio: Floats = total[..., 0] / total[..., 1]
        return ratio

    return Estimator(function, questions_of(evidence, chosen), int(chosen.sum()), uncorrected, withheld, ends)


def token_mean(evidence: Evidence, values: Floats, chosen: NDArray[np.bool_], withheld: str = "") -> Estimator:
    """Mean over tokens of the values ``(N,)`` that exist among the chosen nodes."""
    chosen = chosen & ~np.isnan(values)
    return _ratio(evidence, np.nan_to_num(values), np.ones_like(values), chosen, withheld)


def gradient_figures(
    evidence: Evidence, correction: NoiseCorrection, k: int, chosen: NDArray[np.bool_], status: NDArray[np.str_]
) -> dict[str, Estimator]:
    """Predicted gain, gain-weighted alignment and token mean of teacher ``k`` on the chosen nodes."""
    gain = evidence.gain[:, k]
    finite = chosen & ~np.isnan(gain)
    heard = finite & (evidence.teacher_norm[:, k] > 0)
    seen = bool((evidence.ideal_norm[chosen] > 0).any())
    # Nowhere in this class did success differ: its 0 with an interval of no width would be no finding.
    blind = "" if seen or not chosen.any() else "no difference"
    silent = "" if heard.any() or not finite.any() else "no gradient"
    noisy = _too_noisy(evidence.token_weight * correction.norm, correction, finite)
    reason = blind or silent or noisy
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = evidence.token_weight
        plain_norm = float((weight * np.nan_to_num(gain))[finite].sum() / (weight * evidence.ideal_norm)[finite].sum())
    found = {
        "predicted_gain": token_mean(evidence, gain, chosen, blind),
        "gain_weighted_alignment": _ratio(
            evidence, np.nan_to_num(gain), correction.norm, finite, reason, uncorrected=plain_norm, ends=RANGE
        ),
    }
    measured = heard & (status != UNDEFINED)
    cosine = evidence.cosine[:, k]
    defined = measured & (status == DEFINED)
    plain = float(np.average(cosine[defined], weights=weight[defined])) if defined.any() else float("nan")
    y, one, tilt = np.nan_to_num(cosine), correction.reliability, correction.tilted
    ones = np.ones_like(y)
    sums = _sums(evidence, [ones, correction.size, one * one, one * tilt, tilt * tilt, one * y, tilt * y], measured)
    found["alignment"] = Estimator(
        lambda weights: _regression(weights @ sums),
        questions_of(evidence, measured),
        int(measured.sum()),
        uncorrected=plain,
        withheld=blind or silent or _too_noisy(evidence.token_weight, correction, measured),
        ends=RANGE,
    )
    return found


def _regression(total: Floats) -> Floats:
    """Mean of ``c`` from the sums of its regression on reliability and tilt, ``(..., 7)`` to ``(...)``."""
    mass, size, a, b, c, u, v = np.moveaxis(total, -1, 0)
    c = c + RIDGE * a
    determinant = a * c - b * b
    level, slope = (u * c - v * b) / determinant, (a * v - b * u) / determinant
    mean: Floats = level + slope * size / mass
    return mean


def _too_noisy(weight: Floats, correction: NoiseCorrection, chosen: NDArray[np.bool_]) -> str:
    """Why a corrected figure of the chosen nodes, weighted like this, would be a guess; empty if it is none."""
    weight = weight[chosen]
    if not weight.sum() > 0:
        return ""
    effective = weight.sum() / max(float((weight / correction.effective[chosen]).sum()), 1e-300)
    if effective < LEAST_CONTINUATIONS * (1 - 1e-9):
        return "few continuations"
    reliability = np.average(correction.reliability[chosen], weights=weight)
    return "too noisy" if reliability < LEAST_RELIABILITY else ""


def half_width(evidence: Evidence, figure: str, confidence: float = 0.95) -> float:
    """Largest half-width of a figure's interval over all nodes, among the teachers; infinite where there is none.

    Args:
        evidence: Of a probe's nodes.
        figure: ``"predicted_gain"``, ``"gain_weighted_alignment"`` or ``"alignment"``.
        confidence: In (0, 1).
    """
    correction, status = correct_for_noise(evidence), statuses(evidence)
    everything = np.ones(len(evidence.correct), bool)
    found = [
        jackknife(gradient_figures(evidence, correction, k, everything, status[:, k])[figure], confidence).half_width
        for k in range(evidence.teacher_norm.shape[1])
    ]
    return max((w if w == w else float("inf") for w in found), default=float("inf"))
