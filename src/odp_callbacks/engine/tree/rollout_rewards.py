"""The free mode: predicted gain from the rewards of the rollouts themselves, without continuations."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.records import NodeRecord


def taken_branches(rollout: Rollout, node: Node, logits: Tensor, temperature: float) -> list[Branch]:
    """Return the two branches of a node in the free mode, both with the token that the rollout took.

    The first has the weight 0 and stands for the baseline, the second has the weight 1.

    Args:
        rollout: The rollout.
        node: A node of the rollout.
        logits: ``(V,)``, the student's logits at the node.
        temperature: The sampling temperature.
    """
    token = rollout.response_ids[node.depth]
    probability = float(torch.softmax(logits.double() / temperature, dim=-1)[token])
    return [Branch(token, probability, weight, tail=False) for weight in (0.0, 1.0)]


def from_rewards(rollouts: Sequence[Rollout], records: Sequence[NodeRecord]) -> list[NodeRecord]:
    r"""Fill records of the free mode with the rollouts' rewards.

    :math:`(r - b)(e_y - p)` is an unbiased one-sample estimate of the ideal gradient, whatever the baseline :math:`b`,
    as long as it is independent of the rollout. Here it is the mean reward of the sibling rollouts, or of all other
    rollouts if there is no sibling.

    Args:
        rollouts: The probe's rollouts.
        records: Records of nodes with the branches of :func:`taken_branches`.
    """
    filled_records = []
    for record in records:
        rollout = rollouts[record.rollout]
        others = [other for index, other in enumerate(rollouts) if index != record.rollout]
        rewards = [other.reward for other in others if other.question is rollout.question]
        rewards = rewards or [other.reward for other in others]
        total = np.array([np.mean(rewards) if rewards else 0.0, rollout.reward])
        filled_records.append(replace(record, count=np.ones(2, dtype=np.int64), total=total, total_square=total**2))
    return filled_records
