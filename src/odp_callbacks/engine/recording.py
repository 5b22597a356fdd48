"""What is kept of a node once it is measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from odp_callbacks.engine.branches import Branch
from odp_callbacks.engine.nodes import Node
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.success import Outcomes
from odp_callbacks.records import NodeRecord


def node_record(
    rollout: Rollout,
    node: Node,
    branches: list[Branch],
    outcomes: list[Outcomes],
    *,
    correct: bool,
    gram: Tensor,
    directions: Tensor,
    teacher_probabilities: list[Tensor],
    predictors: Mapping[str, np.ndarray[Any, Any]],
) -> NodeRecord:
    """Put a node's measurements into a record.

    Args:
        rollout: The rollout that it lies on.
        node: The node.
        branches: ``A`` branches.
        outcomes: What their continuations gave.
        correct: Whether the rollout was correct.
        gram: ``(M, C, C)`` float64, ``C = A - 1 + K``.
        directions: ``(C, V)``, on the logits.
        teacher_probabilities: ``(V',)`` for each of ``K`` teachers.
        predictors: ``(K,)`` each.
    """
    rows = directions.double()
    tokens = np.array([b.token for b in branches])
    candidates = [b.token for b in branches if not b.tail]
    # A token beyond a teacher's vocabulary is a padding row of the student's: the teacher gives it nothing.
    q = np.array([[float(t[k]) if k < len(t) else 0.0 for k in tokens] for t in teacher_probabilities])
    inside = np.array([float(sum(t[k] for k in candidates if k < len(t))) for t in teacher_probabilities])
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
        taken=next(a for a, b in enumerate(branches) if b.taken),
        count=np.array([len(o.rewards) for o in outcomes]),
        total=np.array([sum(o.rewards) for o in outcomes]),
        total_square=np.array([sum(r * r for r in o.rewards) for o in outcomes]),
        exact=np.array([o.exact for o in outcomes]),
        gram=gram.numpy(),
        logit_gram=(rows @ rows.mT).cpu().numpy(),
        teacher_probability=q,
        teacher_tail=(1 - inside).clip(0, 1),
        predictors=dict(predictors),
    )
