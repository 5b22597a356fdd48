"""Records of measured nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from odp_callbacks.engine.rewards import UnscoredError
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.records import Floats, NodeRecord


def is_scored(record: NodeRecord) -> bool:
    """Whether every branch of a node has a reward; a reward function may give none to some responses."""
    return bool((record.count > 0).all())


def node_record(
    rollout: Rollout,
    node: Node,
    branches: Sequence[Branch],
    *,
    correct: bool,
    modules: int,
    directions: Tensor,
    teacher_probabilities: list[Tensor],
    predictors: Mapping[str, np.ndarray[Any, Any]],
) -> NodeRecord:
    """Make the record of a node from the directions on its logits; it has neither gradients nor outcomes yet.

    Args:
        rollout: The node's rollout.
        node: The node.
        branches: ``A`` branches.
        correct: Whether the rollout was correct.
        modules: Number of LoRA modules, ``M``.
        directions: ``(C, V)`` directions on the logits, ``C = A - 1 + K``.
        teacher_probabilities: ``(V',)`` for each of ``K`` teachers.
        predictors: ``(K,)`` each.
    """
    directions = directions.double()
    tokens = np.array([branch.token for branch in branches])
    candidates = {branch.token for branch in branches if not branch.tail}
    # A token beyond a teacher's vocabulary is a padding row of the student's; the teacher gives it no probability.
    teacher_probability = np.array(
        [[float(policy[token]) if token < len(policy) else 0.0 for token in tokens] for policy in teacher_probabilities]
    )
    candidate_mass = np.array(
        [float(sum(policy[token] for token in candidates if token < len(policy))) for policy in teacher_probabilities]
    )
    zeros = np.zeros(len(tokens))
    return NodeRecord(
        rollout=node.rollout,
        question=rollout.question.id,
        depth=node.depth,
        inclusion=node.inclusion,
        correct=correct,
        tokens=tokens,
        probability=np.array([branch.probability for branch in branches]),
        weight=np.array([branch.weight for branch in branches]),
        tail=np.array([branch.tail for branch in branches]),
        taken=tokens.tolist().index(rollout.response_ids[node.depth]),
        count=np.zeros(len(tokens), dtype=np.int64),
        total=zeros,
        total_square=zeros,
        exact=np.zeros(len(tokens), dtype=bool),
        gram=np.full((modules, len(directions), len(directions)), np.nan),
        # A copy: the records outlive the probe and must not keep its tensors alive.
        logit_gram=(directions @ directions.mT).cpu().numpy().copy(),
        teacher_probability=teacher_probability,
        teacher_tail=(1 - candidate_mass).clip(0, 1),
        predictors=dict(predictors),
    )


def without_unscored(
    records: Sequence[NodeRecord], grams: Sequence[Floats], is_cut: bool = False
) -> tuple[list[NodeRecord], list[Floats]]:
    """Leave out the nodes that have a branch without a reward.

    Args:
        records: Records with outcomes.
        grams: Their Gram matrices in another geometry; empty if there is none.
        is_cut: Whether a deadline ended the continuations before all nodes had some.

    Raises:
        UnscoredError: If there are nodes and the reward function left none.
    """
    kept = [node_index for node_index, record in enumerate(records) if is_scored(record)]
    if records and not kept and not is_cut:
        raise UnscoredError("`reward` gave None to some branch of every node, so that no node can be measured.")
    return [records[node_index] for node_index in kept], [grams[node_index] for node_index in kept if grams]


def without_outcomes(record: NodeRecord) -> NodeRecord:
    """Return the record as one that has no reward, so that it counts nowhere."""
    return replace(record, count=np.zeros_like(record.count), exact=np.zeros_like(record.exact))


def with_outcomes(record: NodeRecord, outcomes: Sequence[BranchOutcomes]) -> NodeRecord:
    """Return the record with the number, sum and sum of squares of the rewards of each branch."""
    return replace(
        record,
        count=np.array([len(outcome.rewards) for outcome in outcomes], dtype=np.int64),
        total=np.array([sum(outcome.rewards) for outcome in outcomes]),
        total_square=np.array([sum(reward * reward for reward in outcome.rewards) for outcome in outcomes]),
        exact=np.array([outcome.exact for outcome in outcomes]),
    )
