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
            token drawn from the tail it is the tail's mass times the share of draws that hit the token, divided by
            the probability that the tail was drawn from at all, so that the sum stays unbiased.
        tail: Whether the token was drawn from the tail.
    """

    token: int
    probability: float
    weight: float
    tail: bool


def choose_branches(
    probabilities: Tensor,
    certain_tokens: Sequence[int],
    *,
    mass: float,
    max_branches: int,
    tail_draws: int,
    generator: torch.Generator,
    tail_roulette: float | None = None,
) -> list[Branch]:
    """Choose a node's branches: likely tokens, those that rollouts took or teachers propose, and draws from the rest.

    The likely tokens are the most probable ones, until their total probability reaches ``mass`` or their number
    reaches ``max_branches``. The first branch is the most probable token. The tail tokens are drawn with replacement.

    With Russian roulette, a tail of a smaller mass than ``tail_roulette`` is drawn from with the probability
    ``mass / tail_roulette`` only, and its weight is divided by that probability. The ideal gradient's expectation does
    not change, and most nodes whose tail hardly matters spend nothing on it. Source: Kahn, "Use of different Monte
    Carlo sampling techniques" (1956).

    Args:
        probabilities: ``(V,)``, the student's policy at the node.
        certain_tokens: Tokens that are branches in any case, in addition to ``max_branches``: those that the rollouts
            through the node took, and those that teachers propose (:func:`proposed_tokens`).
        mass: Probability that the likely tokens must reach, in (0, 1].
        max_branches: Maximum number of likely tokens, at least 1.
        tail_draws: Number of draws from the rest, at least 1.
        generator: Random stream on the CPU.
        tail_roulette: The tail's mass from which on it is always drawn from; None always draws from it.

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
    candidates += [token for token in dict.fromkeys(certain_tokens) if token not in candidates]
    branches = [Branch(token, float(policy[token]), float(policy[token]), tail=False) for token in candidates]
    tail_policy = policy.clone()
    tail_policy[candidates] = 0
    tail_mass = float(tail_policy.sum())
    drawing = 1.0 if tail_roulette is None else min(1.0, tail_mass / tail_roulette)
    if tail_mass > 0 and (drawing == 1 or float(torch.rand((), generator=generator, dtype=torch.float64)) < drawing):
        drawn_tokens = torch.multinomial(tail_policy, tail_draws, replacement=True, generator=generator)
        tail_tokens, draw_counts = drawn_tokens.unique(return_counts=True)
        branches += [
            Branch(int(token), float(policy[token]), tail_mass / drawing * int(draw_count) / tail_draws, tail=True)
            for token, draw_count in zip(tail_tokens, draw_counts, strict=True)
        ]
    return branches


def proposed_tokens(policies: Sequence[Tensor], threshold: float, most: int) -> list[int]:
    """The tokens that teachers propose: those to which any teacher gives more than a probability.

    arXiv:2605.10889 measures the success of the teacher's tokens above 0.02.

    Args:
        policies: ``(V',)`` for each teacher, its policy at the node.
        threshold: The probability that a token must exceed, in (0, 1).
        most: How many tokens to return at most: those of the greatest probability under any teacher.

    Examples:
        >>> import torch
        >>> proposed_tokens([torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.5, 0.01, 0.49])], 0.02, 2)
        [0, 2]
    """
    highest: dict[int, float] = {}
    for policy in policies:
        for token in (policy > threshold).nonzero().flatten().tolist():
            highest[token] = max(highest.get(token, 0.0), float(policy[token]))
    return sorted(highest, key=lambda token: (-highest[token], token))[:most]
