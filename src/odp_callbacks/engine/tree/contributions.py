"""What the nodes are expected to contribute to predicted gain, before anything is known about success.

A tenth of the tokens carries most of the gain, and which ones can be guessed from the logits: from how much the
teacher's direction varies over the tokens that the student may choose. Nodes are drawn in proportion to that in part
only, so that no token has a weight that is much larger than the others' and means over tokens stay precise, too. This
is sampling with probability proportional to size (Hansen and Hurwitz, 1943); the size is ours. Rewards of a question's
rollouts do not sharpen the guess (``benchmarks/node_sampling.py``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from odp_callbacks.engine.gradients.loss_directions import Direction
from odp_callbacks.engine.gradients.node_logits import NodeLogits
from odp_callbacks.engine.tree.nodes import Node

EVEN_SHARE = 0.6
"""Share of the inclusion probability that does not depend on the expected contribution: Kish's share of the weights
stays above 0.8 on SmolLM2-135M."""


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


def draw_factors(nodes: Sequence[Node], contributions: Tensor) -> Tensor:
    """By how much the probability of keeping each node differs from one in proportion to its weight.

    Args:
        nodes: ``N`` candidates with their inclusion probabilities.
        contributions: ``(N,)``, their expected contributions.

    Returns:
        ``(N,)`` float64, at least :data:`EVEN_SHARE`, with a weighted mean of 1; all 1 where nothing is expected.
    """
    weights = torch.tensor([1 / node.inclusion for node in nodes], dtype=torch.float64)
    mean = float(weights @ contributions / weights.sum()) if len(nodes) else 0.0
    return torch.ones_like(weights) if mean <= 0 else EVEN_SHARE + (1 - EVEN_SHARE) * contributions / mean
