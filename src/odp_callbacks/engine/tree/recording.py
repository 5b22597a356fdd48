"""What is kept of a node once it is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.continuations import BranchOutcomes
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.records import NodeRecord


def node_record(
    rollout: Rollout,
    node: Node,
    branches: Sequence[Branch],
    *,
    correct: bool,
    gram: Tensor,
    directions: Tensor,
    teacher_probabilities: list[Tensor],
    predictors: Mapping[str, np.ndarray[Any, Any]],
) -> NodeRecord:
    """Put a node's gradients into a record that has seen no continuation yet.

    Args:
        rollout: The rollout that it lies on.
        node: The node.
        branches: ``A`` branches.
        correct: Whether the rollout was correct.
        gram: ``(M, C, C)`` float64, ``C = A - 1 + K``.
        directions: ``(C, V)``, on the logits.
        teacher_probabilities: ``(V',)`` for each of ``K`` teachers.
        predictors: ``(K,)`` each.
    """
    rows = directions.double()
    tokens = np.array([b.token for b in branches])
    candidates = {b.token for b in branches if not b.tail}
    # A token beyond a teacher's vocabulary is a padding row of the student's: the teacher gives it nothing.
    q = np.array([[float(t[k]) if k < len(t) else 0.0 for k in tokens] for t in teacher_probabilities])
    inside = np.array([float(sum(t[k] for k in candidates if k < len(t))) for t in teacher_probabilities])
    nothing = np.zeros(len(tokens))
    return NodeRecord(
        rollout=node.rollout,
        question=rollout.question.id,
        depth=node.depth,
        inclusion=node.inclusion,
        correct=correct,
        tokens=tokens,
        probability=np.array([b.probability for b in branches]),
        weight=np.array([b.weight for b in branches]),
        tail=np.array([b.tail for b in branches]),
        # The last one: in the free mode a token stands for itself and, before that, for what it is compared with.
        taken=max(a for a, k in enumerate(tokens) if k == rollout.response_ids[node.depth]),
        count=np.zeros(len(tokens), dtype=np.int64),
        total=nothing,
        total_square=nothing,
        exact=np.zeros(len(tokens), dtype=bool),
        # Copies: the records outlive the probe, and must hold no tensor of it.
        gram=gram.numpy().copy(),
        logit_gram=(rows @ rows.mT).cpu().numpy().copy(),
        teacher_probability=q,
        teacher_tail=(1 - inside).clip(0, 1),
        predictors=dict(predictors),
    )


def with_outcomes(record: NodeRecord, outcomes: Sequence[BranchOutcomes]) -> NodeRecord:
    """The record with what its branches' continuations gave."""
    return replace(
        record,
        count=np.array([len(o.rewards) for o in outcomes], dtype=np.int64),
        total=np.array([sum(o.rewards) for o in outcomes]),
        total_square=np.array([sum(r * r for r in o.rewards) for o in outcomes]),
        exact=np.array([o.exact for o in outcomes]),
    )
