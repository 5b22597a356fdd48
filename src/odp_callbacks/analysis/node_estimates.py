"""From a node's record to its figures: arithmetic on a matrix of about 10 x 10, no model needed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.records import Floats, NodeRecord

DEFINED, UNDEFINED, UNDETERMINED = "defined", "undefined", "undetermined"


@dataclass(frozen=True)
class NodeEstimate:
    """Figures of one node; ``K`` teachers, ``M`` modules. NaN where a figure does not exist.

    Attributes:
        alignment: ``(K,)``, cosine of ideal and distillation gradient on the LoRA parameters, as it comes: noise in
            the success pulls it towards 0.
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


def student_success(node: NodeRecord) -> float:
    """The student's success probability at the node: weights add up to one over candidates and tail."""
    return float(node.weight @ branch_success(node) / node.weight.sum())


def statuses(evidence: Evidence) -> NDArray[np.str_]:
    """Whether each node's alignment with each teacher exists, ``(N, K)``."""
    zero = np.where(evidence.certain, UNDEFINED, UNDETERMINED)[:, None]
    ideal = np.where(evidence.ideal_norm[:, None] == 0, zero, DEFINED)
    found: NDArray[np.str_] = np.where(evidence.teacher_norm > 0, ideal, UNDEFINED)
    return found


def estimate(node: NodeRecord) -> NodeEstimate:
    """Compute a node's figures.

    Source: arXiv:2605.10889 for alignment and teacher advantage; predicted gain is this project's.
    """
    evidence = gather([node])
    return NodeEstimate(
        alignment=evidence.cosine[0],
        module_alignment=np.stack([gather([node], module=m).cosine[0] for m in range(len(node.gram))]),
        logit_alignment=gather([node], logits=True).cosine[0],
        predicted_gain=evidence.gain[0],
        teacher_advantage=teacher_advantage(node),
        ideal_norm=float(evidence.ideal_norm[0]),
        success=student_success(node),
        status=statuses(evidence)[0],
    )


def teacher_advantage(node: NodeRecord) -> Floats:
    """Success of the teacher's next token less the student's, the tail counted as one token: ``(K,)``."""
    success, candidates = branch_success(node), ~node.tail
    base = success[0]
    tail = float(np.average(success[node.tail], weights=node.weight[node.tail])) if node.tail.any() else base
    gained = node.teacher_probability[:, candidates] @ (success[candidates] - base) + node.teacher_tail * (tail - base)
    advantage: Floats = gained - (student_success(node) - base)
    return advantage
