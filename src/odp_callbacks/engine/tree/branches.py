"""The branches of a node: the tokens whose success is measured there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """A token that the student could take at a node.

    Attributes:
        token: The token's id.
        probability: The student's probability of the token, :math:`p_k`.
        weight: The weight of the token's success in the ideal gradient: :math:`p_k` for a likely or taken token. For a
            token drawn from the tail it is the tail's mass times the share of draws that hit the token, so that the
            sum stays unbiased.
        tail: Whether the token was drawn from the tail.
    """

    token: int
    probability: float
    weight: float
    tail: bool


def choose_branches(
    probabilities: Tensor,
    taken_tokens: Sequence[int],
    *,
    mass: float,
    max_branches: int,
    tail_draws: int,
    generator: torch.Generator,
) -> list[Branch]:
    """Choose a node's branches: likely tokens, the tokens that rollouts took, and draws from the rest.

    The likely tokens are the most probable ones, until their total probability reaches ``mass`` or their number
    reaches ``max_branches``. The first branch is the most probable token. The tail tokens are drawn with replacement.

    Args:
        probabilities: ``(V,)``, the student's policy at the node.
        taken_tokens: Tokens that the rollouts through the node took; they come in addition to ``max_branches``.
        mass: Probability that the likely tokens must reach, in (0, 1].
        max_branches: Maximum number of likely tokens, at least 1.
        tail_draws: Number of draws from the rest, at least 1.
        generator: Random stream on the CPU.

    Examples:
        >>> import torch
        >>> policy = torch.tensor([0.1, 0.6, 0.3])
        >>> branches = choose_branches(
        ...     policy, [1], mass=0.9, max_branches=4, tail_draws=1, generator=torch.Generator()
        ... )
        >>> [branch.token for branch in branches]
        [1, 2, 0]
    """
    policy = probabilities.detach().cpu().double()
    policy = policy / policy.sum()
    likely, likely_tokens = policy.topk(min(max_branches, len(policy)))
    # Up to and including the token that reaches the mass.
    likely_count = min(int((likely.cumsum(0) < mass - 1e-12).sum()) + 1, len(likely))
    candidates = [int(token) for token in likely_tokens[:likely_count] if policy[token] > 0]
    candidates += [token for token in dict.fromkeys(taken_tokens) if token not in candidates]
    branches = [Branch(token, float(policy[token]), float(policy[token]), tail=False) for token in candidates]
    tail_policy = policy.clone()
    tail_policy[candidates] = 0
    tail_mass = float(tail_policy.sum())
    if tail_mass > 0:
        drawn_tokens = torch.multinomial(tail_policy, tail_draws, replacement=True, generator=generator)
        tail_tokens, draw_counts = drawn_tokens.unique(return_counts=True)
        branches += [
            Branch(int(token), float(policy[token]), tail_mass * int(draw_count) / tail_draws, tail=True)
            for token, draw_count in zip(tail_tokens, draw_counts, strict=True)
        ]
    return branches
