"""Cheap figures of a token that need no continuations and no gradients, and may predict where a teacher helps.

Records hold those of the two policies. What was recorded before a figure existed has none of it, which is NaN here.
"""

from collections.abc import Callable

import numpy as np

from odp_callbacks.analysis.node_estimates import student_success
from odp_callbacks.analysis.repetition import ngram_repetition
from odp_callbacks.records import Floats, NodeRecord, ProbeReport
from odp_callbacks.update_records import TokenFeatures

PREDICTORS = ("forward_kl", "reverse_kl", "js", "cosine", "teacher_entropy", "student_entropy")
"""Figures of the two policies at a node that every record has."""
TOP_K_PREDICTORS = (
    "top_k_overlap", "overlap_advantage", "student_mass_on_teacher_top_k", "teacher_mass_on_student_top_k",
)  # fmt: skip
"""Figures of the likeliest tokens of both, see :mod:`~odp_callbacks.functional.top_k`; earlier records lack them."""
BOUNDS = dict.fromkeys(TOP_K_PREDICTORS, (0.0, 1.0)) | {"overlap_advantage": (-np.inf, 0.0)}
"""Smallest and largest possible value of those."""
ENTROPY_GAP = "entropy_gap"
"""Absolute difference of the two entropies, in nats (arXiv:2604.13016, eq. 8)."""
POLICY_PREDICTORS = (*PREDICTORS, ENTROPY_GAP, *TOP_K_PREDICTORS)
"""All figures of the two policies at a node."""
NODE_PREDICTORS = ("depth", *POLICY_PREDICTORS, "repetition", "success")
"""What may predict the alignment or the gain of a node. ``success`` is the student's success there, which is measured
by the same continuations as the alignment."""
TOKEN_PREDICTORS = ("depth", "reverse_kl", "teacher_entropy", "student_entropy", ENTROPY_GAP, *TOP_K_PREDICTORS,
                    "repetition")  # fmt: skip
"""What may predict the influence of a token."""


def policy_predictor(node: NodeRecord, name: str) -> Floats:
    """A figure of the two policies at a node, ``(K,)``; NaN if the record has none.

    Args:
        node: A node's record.
        name: Of :data:`POLICY_PREDICTORS`.
    """
    if name == ENTROPY_GAP:
        gap: Floats = np.abs(node.predictors["teacher_entropy"] - node.predictors["student_entropy"])
        return gap
    return node.predictors.get(name, np.full(len(node.teacher_tail), np.nan))


def node_predictor(report: ProbeReport, name: str) -> Floats:
    """A predictor at all ``N`` nodes of a report, ``(N, K)``; NaN where it is not known.

    Args:
        report: A probe's report.
        name: Of :data:`NODE_PREDICTORS`.
    """
    teachers = len(report.teachers)
    if name in POLICY_PREDICTORS:
        return np.array([policy_predictor(node, name) for node in report.nodes]).reshape(-1, teachers)
    if name == "repetition":
        repetition = response_repetition(report)
        column = np.array([repetition[node.rollout] for node in report.nodes])
    else:
        value: Callable[[NodeRecord], float] = student_success if name == "success" else lambda node: float(node.depth)
        column = np.array([value(node) for node in report.nodes])
    return np.repeat(column.reshape(-1, 1), teachers, axis=1)


def token_predictors(report: ProbeReport) -> dict[str, Floats]:
    """Predictors of all ``T`` response tokens of a report, rollout after rollout.

    Args:
        report: A probe's report.

    Returns:
        ``(T, K)`` for each of :data:`TOKEN_PREDICTORS`; NaN for tokens whose update was not measured, except for depth
        and repetition, which are known of all.
    """
    lengths = [len(rollout.pieces) for rollout in report.rollouts]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    table = {name: np.full((starts[-1], len(report.teachers)), np.nan) for name in TOKEN_PREDICTORS}
    table["depth"][:] = (np.arange(starts[-1]) - np.repeat(starts[:-1], lengths))[:, None]
    table["repetition"][:] = np.repeat(response_repetition(report), lengths)[:, None]
    for update in report.updates:
        if update.features is not None:
            places = starts[update.features.rollout] + update.features.depth
            for name in TOKEN_PREDICTORS:
                if name not in ("depth", "repetition"):
                    table[name][places] = _of_features(update.features, name)
    return table


def response_repetition(report: ProbeReport) -> Floats:
    """Repetition of each of the ``R`` responses, ``(R,)``; see :func:`~odp_callbacks.analysis.repetition`."""
    return np.array([ngram_repetition(rollout.pieces) for rollout in report.rollouts], dtype=np.float64)


def _of_features(features: TokenFeatures, name: str) -> Floats:
    """A predictor of ``N`` tokens, ``(N, K)``, or ``(N, 1)`` if it is the same for all teachers."""
    if name == ENTROPY_GAP:
        gap: Floats = np.abs(features.teacher_entropy - features.student_entropy[:, None])
        return gap
    values: Floats | None = getattr(features, name)
    if values is None:
        return np.full((len(features.depth), 1), np.nan)
    return values[:, None] if values.ndim == 1 else values
