"""Nodes in proportion to what they are expected to contribute to predicted gain.

A tenth of the tokens carries most of the gain, and which ones can be guessed from the logits: from how much the
teacher's direction varies over the tokens that the student may choose. Half of the probability is even all the same, so
that no token has a weight that is much larger than the others' and means over tokens stay precise, too. This is
sampling with probability proportional to size (Hansen and Hurwitz, 1943); the size is ours. Rewards of a question's
rollouts do not sharpen the guess (``benchmarks/node_sampling.py``).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from odp_callbacks.engine.gradients.loss_directions import Direction
from odp_callbacks.engine.gradients.node_logits import NodeLogits
from odp_callbacks.engine.tree.nodes import Node, inclusion_probabilities, systematic_sample

EVEN_SHARE = 0.5
"""Share of the inclusion probability that does not depend on the expected contribution."""


def expected_contributions(logits: NodeLogits, direction: Direction, temperature: float) -> Tensor:
    r"""Expected size of the gain at each node, up to a common factor.

    On the logits, with independent successes :math:`Q_k` of standard deviation :math:`\sigma`, the gain
    :math:`\sum_k p_k (Q_k - V) d_k / \|d\|` has the standard deviation
    :math:`\sigma \sqrt{\sum_k p_k^2 (d_k - \sum_j p_j d_j)^2} / \|d\|`. This is computed for :math:`\sigma = 1`, as a
    root mean square over teachers.

    Args:
        logits: The student's and the teachers' logits at ``N`` nodes.
        direction: Descent direction of the distillation loss on the logits.
        temperature: Of the student's policy.

    Returns:
        ``(N,)`` float64.
    """
    sizes = torch.zeros(len(logits.student_logits), dtype=torch.float64)
    for number in range(len(logits.questions)):
        for of_rollout in logits.of_question(number):
            policy = torch.softmax(of_rollout.student.double() / temperature, dim=-1)  # (N_r, V)
            depths = [logits.nodes[index].depth for index in of_rollout.node_indices]
            taken = torch.tensor([of_rollout.rollout.response_ids[depth] for depth in depths], device=policy.device)
            squares = torch.zeros(len(depths), dtype=torch.float64, device=policy.device)
            for teacher in of_rollout.teachers:
                pull = direction(of_rollout.student, teacher, taken).double()
                centred = pull - (policy * pull).sum(dim=-1, keepdim=True)
                squares += (policy * centred).square().sum(-1) / pull.square().sum(-1).clamp(min=1e-300)
            sizes[of_rollout.node_indices] = (squares / max(1, len(of_rollout.teachers))).sqrt().cpu()
    return sizes.nan_to_num(0.0, 0.0, 0.0)


def sampling_sizes(nodes: Sequence[Node], contributions: Tensor) -> Tensor:
    """What the probability of keeping each node is proportional to, ``(N,)``.

    Args:
        nodes: ``N`` candidates with their inclusion probabilities.
        contributions: ``(N,)``, their expected contributions.
    """
    weights = torch.tensor([1 / node.inclusion for node in nodes], dtype=torch.float64)
    even = weights / weights.sum()
    sized = weights * contributions
    total = float(sized.sum())
    return even if total <= 0 else EVEN_SHARE * even + (1 - EVEN_SHARE) * sized / total


def pick_by_contribution(
    nodes: Sequence[Node], contributions: Tensor, count: float, generator: torch.Generator
) -> list[Node]:
    """Keep some of the candidates, with probabilities that grow with their expected contributions.

    Args:
        nodes: The candidates with their inclusion probabilities.
        contributions: Expected contribution of each.
        count: Expected number of nodes that are kept.
        generator: Random stream, on the CPU.

    Returns:
        The nodes that are kept, with their inclusion probabilities reduced accordingly.
    """
    if not nodes:
        return []
    keeping = inclusion_probabilities(sampling_sizes(nodes, contributions), count)
    return [
        replace(nodes[place], inclusion=nodes[place].inclusion * probability)
        for place, probability in systematic_sample(keeping, generator)
    ]
