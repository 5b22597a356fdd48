"""The figures of a single node."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.records import Floats, NodeRecord

DEFINED, UNDEFINED, UNDETERMINED = "defined", "undefined", "undetermined"
"""Status of a node's alignment: it exists; a gradient is zero for certain; the continuations cannot tell."""
NOT_COMPUTED = "not computed"
"""Status of an alignment that exists at a node whose gradients were not computed; other nodes stand for it."""


@dataclass(frozen=True)
class NodeEstimate:
    """Figures of one node with ``K`` teachers and ``M`` modules; NaN where a figure does not exist.

    Attributes:
        alignment: ``(K,)``, cosine of ideal and distillation gradient on the LoRA parameters, not corrected for noise
            in the successes, which pulls it towards 0.
        module_alignment: ``(M, K)``, the same on the parameters of each module alone.
        logit_alignment: ``(K,)``, the same on the logits.
        predicted_gain: ``(K,)``, success probability gained per unit step of the LoRA parameters along the
            distillation gradient; 0 where that gradient is zero, NaN where success differs but the gradient is unknown.
        teacher_advantage: ``(K,)``, expected success after the teacher's next token minus that after the student's.
        ideal_norm: Norm of the estimated ideal gradient on the LoRA parameters; noise makes it too large on average.
        success: The student's success probability at the node.
        status: ``(K,)``: ``"defined"``; ``"undefined"`` where a gradient is zero for certain; ``"undetermined"``
            where the continuations cannot tell; ``"not computed"`` where gradients are missing.
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


def student_success(node: NodeRecord) -> float:
    """The student's success probability at the node: the weighted mean of its branches' successes."""
    return float(node.weight @ branch_success(node) / node.weight.sum())


def statuses(evidence: Evidence) -> NDArray[np.str_]:
    """Status of each node's alignment with each teacher, ``(N, K)``; see :data:`DEFINED`."""
    status_without_ideal = np.where(evidence.certain, UNDEFINED, UNDETERMINED)[:, None]
    status_with_ideal = np.where(evidence.gradient_weight > 0, DEFINED, NOT_COMPUTED)[:, None]
    status_with_teacher = np.where(evidence.differs[:, None], status_with_ideal, status_without_ideal)
    status: NDArray[np.str_] = np.where(evidence.teacher_norm > 0, status_with_teacher, UNDEFINED)
    return status


def estimate(node: NodeRecord) -> NodeEstimate:
    """Compute a node's figures.

    The alignment on the logits and the teacher advantage are those of arXiv:2605.10889 (eqs. 2.12 and 2.1), except that
    the tail counts as one token here, while the paper renormalises over the tokens that were visited. The alignment on
    the LoRA parameters and the predicted gain are ours.
    """
    evidence = gather([node])
    module_cosines = [gather([node], module=module_index).cosine[0] for module_index in range(len(node.gram))]
    return NodeEstimate(
        alignment=evidence.cosine[0],
        module_alignment=np.stack(module_cosines),
        logit_alignment=gather([node], logits=True).cosine[0],
        predicted_gain=evidence.gain[0],
        teacher_advantage=teacher_advantage(node),
        ideal_norm=float(evidence.ideal_norm[0]),
        success=student_success(node),
        status=statuses(evidence)[0],
    )


def teacher_advantage(node: NodeRecord) -> Floats:
    """Expected success after the teacher's next token minus that after the student's, ``(K,)``.

    All tokens of the tail count as one token, whose success is the weighted mean of those drawn from the tail. Success
    is measured from that of the first branch, so that a common constant cancels.
    """
    success, candidates = branch_success(node), ~node.tail
    difference = success - success[0]
    tail_difference = 0.0
    if node.tail.any():
        # Above the tail's mass where it was drawn from with a probability below 1, which the factor makes up for.
        drawn_weight, tail_mass = node.weight[node.tail].sum(), 1 - node.probability[candidates].sum()
        tail_difference = float(np.average(difference[node.tail], weights=node.weight[node.tail]))
        tail_difference *= max(1.0, float(drawn_weight / max(tail_mass, np.finfo(float).tiny)))
    teacher_gain = node.teacher_probability[:, candidates] @ difference[candidates]
    advantage: Floats = teacher_gain + node.teacher_tail * tail_difference - node.weight @ difference
    return advantage
