r"""Intervals for the alignment of single tokens, given the few continuations of each branch.

The cosine of a token is that of an *estimated* ideal gradient. Draws of the branches' true successes from
:mod:`~odp_callbacks.analysis.success_model` give draws of the true ideal gradient, and so of the true cosine: an
empirical Bayes credible interval. A token whose interval contains 0 does not even tell whether the teacher pulls
towards success or away from it. These intervals are ours.

The success model is the symmetric one, without leads: a token cannot become significant because the student's most
probable token wins elsewhere in the probe, only through its own rewards. How much a difference between rewards is worth
is learned from all nodes. Where every branch always gave the same reward, two continuations against two may suffice;
where branches hardly differ, thirty may not.
"""

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import ROUNDING_ERROR, Evidence, norm
from odp_callbacks.analysis.success_model import SuccessModel, fit_success_model
from odp_callbacks.records import Floats

NODES_PER_CHUNK = 2048
"""Number of nodes drawn at a time, because the draws of a whole probe need not fit into memory together."""


def alignment_intervals(evidence: Evidence, confidence: float = 0.95, draws: int = 256) -> tuple[Floats, Floats]:
    """Equal-tailed credible interval of the true alignment of each node with each teacher.

    A draw in which all successes are equal has no direction and counts as 0. The intervals contain the truth with the
    given probability on average over tokens like those of the probe. Among the intervals that exclude 0, a few lie on
    the wrong side, mostly where a node's tokens hardly differ.

    Args:
        evidence: ``N`` nodes, ``K`` teachers.
        confidence: Level of the intervals, in (0, 1).
        draws: Number of draws of each node's successes; the same evidence gives the same draws.

    Returns:
        Lower and upper ends, each ``(N, K)`` in [-1, 1]; NaN where the teacher's gradient is zero, infinite or not
        known.

    Examples:
        >>> from odp_callbacks.analysis.evidence import gather
        >>> alignment_intervals(gather([]))[0].shape
        (0, 0)
    """
    model = fit_success_model(evidence, symmetric=True)
    node_count, teacher_count = evidence.teacher_norm.shape
    interval_ends = np.full((2, node_count, teacher_count), np.nan)
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    for chunk_index, start in enumerate(range(0, node_count, NODES_PER_CHUNK)):
        node_indices = np.arange(start, min(start + NODES_PER_CHUNK, node_count))
        cosine = _draw_cosines(evidence, model, node_indices, draws, seed=chunk_index)  # (n, K, S)
        has_direction = (evidence.teacher_norm[node_indices] > 0) & np.isfinite(evidence.gain_form[node_indices]).all(
            axis=-1
        )
        has_direction &= evidence.gradient_weight[node_indices, None] > 0
        chunk_ends = np.quantile(cosine, quantiles, axis=-1)
        interval_ends[:, node_indices] = np.where(has_direction, chunk_ends, np.nan)
    return interval_ends[0], interval_ends[1]


def _draw_cosines(
    evidence: Evidence, model: SuccessModel, node_indices: NDArray[np.int64], draws: int, seed: int
) -> Floats:
    """Draws of the true cosine of ``n`` nodes with each teacher, ``(n, K, S)``."""
    chunk = evidence.take(node_indices)
    chunk_model = SuccessModel(
        model.prior, model.log_likelihood[node_indices], model.wins[node_indices], model.losses[node_indices]
    )
    successes = chunk_model.draw(chunk, draws, seed=seed)  # (n, S, A)
    difference = successes - successes[:, :, :1]
    offset = np.where(chunk.real[:, None] & (np.abs(difference) > ROUNDING_ERROR), difference, 0)
    ideal_norm = norm(chunk.norm_form, offset)[:, None]  # (n, 1, S)
    gain = np.einsum("nka,nsa->nks", chunk.gain_form, offset, optimize=True)
    cosine: Floats = np.divide(gain, ideal_norm, out=np.zeros_like(gain), where=ideal_norm > 0)
    return cosine.clip(-1, 1)
