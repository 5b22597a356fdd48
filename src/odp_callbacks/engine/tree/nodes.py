"""Which positions of a rollout are measured, and with what probability each of them is chosen."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.randomness import Randomness


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
"""From a rollout and a random stream (CPU) to ``(depth, inclusion probability)`` pairs.

One with the attribute ``uses_entropy`` gets rollouts whose ``entropy`` is filled in.
"""


def exponential_windows(rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
    """One position from each of the depth windows [0, 1), [1, 2), [2, 4), [4, 8), ..., uniformly.

    The last window ends with the response. The number of nodes grows with the logarithm of the length, and so does
    the cost. Source: arXiv:2605.10889.

    Examples:
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


@dataclass(frozen=True)
class UniformNodes:
    """``count`` positions of each response, every one as likely as any other.

    Attributes:
        count: At least 1; shorter responses are taken whole.

    Examples:
        >>> import torch
        >>> from odp_callbacks.engine.prompts import Question
        >>> rollout = Rollout(Question("0", {}, torch.tensor([1])), tuple(range(8)), "", False)
        >>> [p for _, p in UniformNodes(2)(rollout, torch.Generator().manual_seed(0))]
        [0.25, 0.25]
    """

    count: int = 4

    def __post_init__(self) -> None:
        """Check the count."""
        _check_count(self.count)

    def __call__(self, rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
        """Choose."""
        length = len(rollout.response_ids)
        count = min(self.count, length)
        return [(d, count / length) for d in torch.randperm(length, generator=generator)[:count].tolist()]


@dataclass(frozen=True)
class EntropyNodes:
    """About ``count`` positions of each response, the likelier the less sure the student was there.

    The inclusion probability is proportional to the entropy of the student's policy, above a floor (a tenth is spread
    evenly, so that every position can be chosen) and up to 1. Systematic sampling keeps the number of nodes within one
    of ``count``.

    Attributes:
        count: At least 1.
    """

    count: int = 4
    uses_entropy = True

    def __post_init__(self) -> None:
        """Check the count."""
        _check_count(self.count)

    def __call__(self, rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
        """Choose."""
        assert rollout.entropy is not None
        entropy = rollout.entropy.double()
        total = float(entropy.sum())
        even = torch.full_like(entropy, 1 / len(entropy))
        share = 0.1 * even + 0.9 * (entropy / total if total > 0 else even)
        inclusion = inclusion_probabilities(share, self.count)
        edges = inclusion.cumsum(0) - torch.rand((), generator=generator, dtype=torch.float64)
        hit = edges.ceil() - (edges - inclusion).ceil() >= 1
        return [(int(d), float(inclusion[d])) for d in hit.nonzero()]


def inclusion_probabilities(share: torch.Tensor, count: int) -> torch.Tensor:
    """Probabilities proportional to ``share`` that add up to ``count``, none above 1.

    Args:
        share: ``(T,)``, positive.
        count: How many are wanted; all of them if it reaches ``T``.

    Examples:
        >>> inclusion_probabilities(torch.tensor([6.0, 1.0, 1.0]), 2)
        tensor([1.0000, 0.5000, 0.5000])
    """
    found = torch.ones_like(share)
    free = torch.ones(len(share), dtype=torch.bool)
    while int(free.sum()) > (left := count - int((~free).sum())):
        scaled = share * left / share[free].sum()
        found = torch.where(free, scaled, found)
        if not (over := free & (scaled > 1)).any():
            break
        found[over] = 1.0
        free &= ~over
    return found.clamp(max=1)


def _check_count(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"`count` must be a positive integer, but {count!r} was given.")


STRATEGIES: dict[str, NodeSelector] = {
    "exponential": exponential_windows,
    "every": every_node,
    "uniform": UniformNodes(),
    "entropy": EntropyNodes(),
}


def select_nodes(selector: NodeSelector, rollouts: list[Rollout], randomness: Randomness) -> list[Node]:
    """Apply a selector to every rollout; what it draws depends on the question and on the rollout's place in it.

    Raises:
        ValueError: If it chooses a position outside the response, or states an impossible probability.
    """
    nodes = []
    place: Counter[int] = Counter()
    for index, rollout in enumerate(rollouts):
        question = rollout.question
        generator = randomness.generator(question.id, "nodes", place[id(question)])
        place[id(question)] += 1
        for depth, inclusion in sorted(selector(rollout, generator)):
            if not 0 <= depth < len(rollout.response_ids) or not 0 < inclusion <= 1:
                raise ValueError(
                    f"`nodes` must choose depths in [0, {len(rollout.response_ids)}) with a probability in (0, 1], "
                    f"but it gave {(depth, inclusion)!r}."
                )
            nodes.append(Node(index, depth, inclusion))
    return nodes
