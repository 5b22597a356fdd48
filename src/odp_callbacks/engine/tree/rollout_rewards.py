"""The free mode: predicted gain from the rollouts themselves, without a continuation."""

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
    """The token that was taken, and before it what it is compared with: itself, with a weight of 0.

    Args:
        rollout: The rollout.
        node: A node of it.
        logits: ``(V,)``, the student's.
        temperature: Of sampling.
    """
    token = rollout.response_ids[node.depth]
    p = float(torch.softmax(logits.double() / temperature, dim=-1)[token])
    return [Branch(token, p, weight, tail=False) for weight in (0.0, 1.0)]


def from_rewards(rollouts: Sequence[Rollout], records: Sequence[NodeRecord]) -> list[NodeRecord]:
    r"""The free mode: :math:`(r - b)(e_y - p)` is an unbiased one-sample estimate of the ideal gradient.

    The baseline is the mean reward of the sibling rollouts, or of all others where there is none; it only has to be
    independent of the rollout's own.
    """
    found = []
    for record in records:
        own = rollouts[record.rollout]
        others = [r for i, r in enumerate(rollouts) if i != record.rollout]
        siblings = [r.reward for r in others if r.question is own.question] or [r.reward for r in others]
        pair = np.array([np.mean(siblings) if siblings else 0.0, own.reward])
        found.append(replace(record, count=np.ones(2, dtype=np.int64), total=pair, total_square=pair**2))
    return found
