"""From a node's record to its figures: arithmetic on a matrix of about 10 x 10, no model needed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.records import Floats, NodeRecord

DEFINED, UNDEFINED, UNDETERMINED = "defined", "undefined", "undetermined"


@dataclass(frozen=True)
class NodeEstimate:
    """Figures of one node; ``K`` teachers, ``M`` modules. NaN where a figure does not exist.

    Attributes:
        alignment: ``(K,)``, cosine of ideal and distillation gradient on the LoRA parameters.
        module_alignment: ``(M, K)``, the same on each module alone.
        logit_alignment: ``(K,)``, the same on the logits.
        predicted_gain: ``(K,)``, success probability gained per unit step of the LoRA parameters along the
            distillation gradient; 0 where that is zero.
        teacher_advantage: ``(K,)``, success expected of the teacher's next token less that of the student's.
        ideal_norm: Norm of the estimated ideal gradient on the LoRA parameters; noise in the success lengthens it.
        success: The student's success probability at the node.
        status: ``(K,)``: ``"defined"``; ``"undefined"`` where a gradient is zero for certain; ``"undetermined"``
            where the continuations cannot tell.
    """

    alignment: Floats
    module_alignment: Floats
    logit_alignment: Floats
    predicted_gain: Floats
    teacher_advantage: Floats
    ideal_norm: float
    success: float
    status: NDArray[np.str_]


def branch_success(node: NodeRecord) -> Floats:
    """Mean reward of each branch's continuations, ``(A,)``."""
    return node.total / node.count


def ideal_coefficients(weight: Floats, success: Floats) -> Floats:
    r"""Coefficients of the ideal gradient on the branch directions, ``(..., A - 1)``.

    :math:`g^* = \sum_{a \ge 1} w_a (Q_a - Q_0)\, u_a` with :math:`u_a = (e_{k_a} - p)/\tau`. Over all tokens
    :math:`\sum_k p_k u_k = 0`, so any constant may be taken off every :math:`Q`; taking that of branch 0 spares its
    pull-back, makes equal successes cancel exactly, and keeps the draws from the tail, whose weights only add up in
    the mean, from adding noise of their own.

    Args:
        weight: ``(A,)``.
        success: ``(..., A)``.
    """
    difference = success[..., 1:] - success[..., :1]
    # The mean of three rewards of 0.1 is not 0.1 in floating point; no two successes differ by as little.
    return weight[1:] * np.where(np.abs(difference) > 16 * np.finfo(np.float64).eps, difference, 0)


def student_success(node: NodeRecord, success: Floats) -> float:
    """The student's success probability at the node: weights add up to one over candidates and tail."""
    return float(node.weight @ success / node.weight.sum())


def estimate(node: NodeRecord) -> NodeEstimate:
    """Compute a node's figures.

    Source: arXiv:2605.10889 for alignment and teacher advantage; predicted gain is this project's.
    """
    success = branch_success(node)
    arms = len(node.tokens) - 1
    coefficients = ideal_coefficients(node.weight, success)
    gram = node.gram.sum(axis=0)
    alignment, ideal_norm = _cosines(gram, coefficients)
    teacher_norm = np.sqrt(np.diagonal(gram)[arms:].clip(min=0))
    inner = coefficients @ gram[:arms, arms:]
    nothing = np.where(teacher_norm == 0, 0.0, np.nan)  # NaN: a teacher infinitely far has no finite gradient
    gain = np.divide(inner, teacher_norm, out=nothing, where=teacher_norm > 0)
    # Certain only if every possible token was seen: a tail holds more than the tokens that were drawn from it.
    seen = np.isclose(node.weight[node.tail].sum(), node.probability[node.tail].sum(), rtol=1e-9, atol=0)
    certain = bool(seen) and (arms == 0 or bool(node.exact.all()))
    blank = UNDEFINED if certain else UNDETERMINED
    status = np.where(teacher_norm > 0, np.where(ideal_norm == 0, blank, DEFINED), UNDEFINED)
    return NodeEstimate(
        alignment=alignment,
        module_alignment=np.stack([_cosines(g, coefficients)[0] for g in node.gram]),
        logit_alignment=_cosines(node.logit_gram, coefficients)[0],
        predicted_gain=gain,
        teacher_advantage=_teacher_advantage(node, success),
        ideal_norm=ideal_norm,
        success=student_success(node, success),
        status=status,
    )


def _cosines(gram: Floats, coefficients: Floats) -> tuple[Floats, float]:
    """Cosine of the ideal with each teacher's gradient ``(K,)``, NaN where either is zero; and the ideal's norm."""
    arms = len(coefficients)
    inner = coefficients @ gram[:arms, arms:]
    # A quadratic form can come out at -1e-20 where it is zero.
    ideal = np.sqrt(max(float(coefficients @ gram[:arms, :arms] @ coefficients), 0.0))
    norms = ideal * np.sqrt(np.diagonal(gram)[arms:].clip(min=0))
    cosine = np.divide(inner, norms, out=np.full(len(inner), np.nan), where=norms > 0)
    return cosine.clip(-1, 1), ideal


def _teacher_advantage(node: NodeRecord, success: Floats) -> Floats:
    """Success of the teacher's next token less the student's, the tail counted as one token: ``(K,)``."""
    candidates = ~node.tail
    base = success[0]
    tail = float(np.average(success[node.tail], weights=node.weight[node.tail])) if node.tail.any() else base
    gained = node.teacher_probability[:, candidates] @ (success[candidates] - base) + node.teacher_tail * (tail - base)
    advantage: Floats = gained - (student_success(node, success) - base)
    return advantage
