"""The tokens whose success is measured at a node: the student's likely ones, and draws from the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """A token that the student could take at a node.

    Attributes:
        token: Its id.
        probability: The student's :math:`p_k`.
        weight: What its success counts with in the ideal gradient: :math:`p_k` for a candidate; for a tail token,
            the tail's mass times the share of tail draws that hit it, so that the sum stays unbiased.
        tail: Whether it was drawn from the tail.
    """

    token: int
    probability: float
    weight: float
    tail: bool


def choose_branches(
    probabilities: Tensor,
    taken: Sequence[int],
    *,
    mass: float,
    most: int,
    tail_draws: int,
    generator: torch.Generator,
) -> list[Branch]:
    """Choose a node's branches.

    The most probable tokens until they hold ``mass`` or are ``most``, then the tokens that rollouts took, then
    ``tail_draws`` tokens drawn with replacement from what is left. The first branch is the most probable token.

    Args:
        probabilities: ``(V,)``, the student's policy at the node.
        taken: Tokens that the rollouts through the node took.
        mass: In (0, 1].
        most: At least 1; tokens that were taken may come on top.
        tail_draws: At least 1.
        generator: Random stream on the CPU.

    Examples:
        >>> import torch
        >>> p = torch.tensor([0.1, 0.6, 0.3])
        >>> [b.token for b in choose_branches(p, [1], mass=0.9, most=4, tail_draws=1, generator=torch.Generator())]
        [1, 2, 0]
    """
    p = probabilities.detach().cpu().double()
    p = p / p.sum()
    top, ids = p.topk(min(most, len(p)))
    # Up to and including the token that reaches the mass.
    count = min(int((top.cumsum(0) < mass - 1e-12).sum()) + 1, len(top))
    candidates = [int(k) for k in ids[:count] if p[k] > 0]
    candidates += [k for k in dict.fromkeys(taken) if k not in candidates]
    branches = [Branch(k, float(p[k]), float(p[k]), False) for k in candidates]
    rest = p.clone()
    rest[candidates] = 0
    left = float(rest.sum())
    if left > 0:
        drawn, counts = torch.multinomial(rest, tail_draws, replacement=True, generator=generator).unique(
            return_counts=True
        )
        branches += [
            Branch(int(k), float(p[k]), left * int(n) / tail_draws, True) for k, n in zip(drawn, counts, strict=True)
        ]
    return branches
