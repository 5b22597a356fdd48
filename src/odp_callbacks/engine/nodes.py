"""Which positions of a rollout are measured, and with what probability each of them is chosen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from odp_callbacks.engine.rollouts import Rollout


@dataclass(frozen=True)
class Node:
    """A position of a rollout: the prefix before it, where the student chooses its next token.

    Attributes:
        rollout: Index of the rollout in its probe.
        depth: Number of response tokens before the choice, from 0.
        inclusion: Probability that the selector chooses this position; its inverse weighs the node in means over
            tokens (Horvitz-Thompson), so that they stay unbiased.
    """

    rollout: int
    depth: int
    inclusion: float


NodeSelector = Callable[[Rollout, torch.Generator], list[tuple[int, float]]]
"""From a rollout and a random stream (CPU) to ``(depth, inclusion probability)`` pairs."""


def exponential_windows(rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
    """One position from each of the depth windows [0, 1), [1, 2), [2, 4), [4, 8), ..., uniformly.

    The last window ends with the response. The number of nodes grows with the logarithm of the length, and so does
    the cost. Source: arXiv:2605.10889.

    Example:
        >>> import torch
        >>> from odp_callbacks.engine.prompts import Question
        >>> rollout = Rollout(Question("0", {}, torch.tensor([1])), tuple(range(6)), "", False)
        >>> [p for _, p in exponential_windows(rollout, torch.Generator().manual_seed(0))]
        [1.0, 1.0, 0.5, 0.5]
    """
    chosen = []
    start, length = 0, len(rollout.response_ids)
    while start < length:
        end = min(max(2 * start, 1), length)
        depth = start + int(torch.randint(end - start, (1,), generator=generator))
        chosen.append((depth, 1 / (end - start)))
        start = end
    return chosen


def every_node(rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
    """Every position of the response."""
    return [(depth, 1.0) for depth in range(len(rollout.response_ids))]


def select_nodes(selector: NodeSelector, rollouts: list[Rollout], generator: torch.Generator) -> list[Node]:
    """Apply a selector to every rollout.

    Raises:
        ValueError: If it chooses a position outside the response, or states an impossible probability.
    """
    nodes = []
    for index, rollout in enumerate(rollouts):
        for depth, inclusion in sorted(selector(rollout, generator)):
            if not 0 <= depth < len(rollout.response_ids) or not 0 < inclusion <= 1:
                raise ValueError(
                    f"`nodes` must choose depths in [0, {len(rollout.response_ids)}) with a probability in (0, 1], "
                    f"but it gave {(depth, inclusion)!r}."
                )
            nodes.append(Node(index, depth, inclusion))
    return nodes
