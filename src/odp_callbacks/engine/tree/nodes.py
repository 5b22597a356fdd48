"""Node selection: which positions of a rollout are measured, and with what probability each is chosen."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.user_defaults import call_with_user_defaults


@dataclass(frozen=True)
class Node:
    """A position of a rollout, where the student chooses its next token.

    Attributes:
        rollout: Index of the rollout in its probe.
        depth: Number of response tokens before the position, from 0.
        inclusion: Probability that the selector chooses this position. Its inverse weights the node in means over
            tokens (Horvitz-Thompson), so that they stay unbiased.
    """

    rollout: int
    depth: int
    inclusion: float


NodeSelector = Callable[[Rollout, torch.Generator], list[tuple[int, float]]]
"""A function from a rollout and a random stream (on the CPU) to ``(depth, inclusion probability)`` pairs.

A selector with the attribute ``uses_entropy`` receives rollouts with their ``entropy``.
"""


def exponential_windows(rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
    """Select one position from each of the depth windows [0, 1), [1, 2), [2, 4), [4, 8), ..., uniformly.

    The last window ends with the response. The number of nodes, and with it the cost, grows with the logarithm of the
    length. The draw is ours: arXiv:2605.10889 has windows of 50, 100, 200, ... tokens and ranks the tokens in each.

    Examples:
        >>> import torch
        >>> from odp_callbacks.engine.prompts import Question
        >>> rollout = Rollout(Question("0", {}, torch.tensor([1])), tuple(range(6)), "", False)
        >>> [inclusion for _, inclusion in exponential_windows(rollout, torch.Generator().manual_seed(0))]
        [1.0, 1.0, 0.5, 0.5]
    """
    positions = []
    start, length = 0, len(rollout.response_ids)
    while start < length:
        end = min(max(2 * start, 1), length)
        depth = start + int(torch.randint(end - start, (1,), generator=generator))
        positions.append((depth, 1 / (end - start)))
        start = end
    return positions


@dataclass(frozen=True)
class BalancedNodes:
    """Selects positions with nearly equal weights, as many in a response as it has exponential windows.

    With one node in each window, a node of the last window stands for half of the response and one of the first for a
    single token: means over tokens then rest on the few last nodes. Here a share :data:`EVEN_SHARE` of the inclusion
    probability is spread evenly over all positions, so that the weights have an effective sample size of at least that
    share of the nodes (Kish, "Survey sampling", 1965). The rest is spread evenly over the windows, so that every depth
    keeps some nodes. Systematic sampling keeps the number of nodes within one of the expected one. The mixture is ours.

    Attributes:
        count: Expected number of positions; None for the number of exponential windows.

    Examples:
        >>> import torch
        >>> from odp_callbacks.engine.prompts import Question
        >>> rollout = Rollout(Question("0", {}, torch.tensor([1])), tuple(range(64)), "", False)
        >>> len(BalancedNodes()(rollout, torch.Generator().manual_seed(0)))
        7
    """

    count: int | None = None

    def __post_init__(self) -> None:
        """Check the count."""
        if self.count is not None:
            _check_count(self.count)

    def __call__(self, rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
        """Select positions of a rollout."""
        length = len(rollout.response_ids)
        window = torch.arange(length).double().log2().floor().clamp(min=-1)  # depth 0 is a window of its own
        _, window_index, sizes = window.unique(return_inverse=True, return_counts=True)
        share = EVEN_SHARE / length + (1 - EVEN_SHARE) / (len(sizes) * sizes[window_index].double())
        return systematic_sample(inclusion_probabilities(share, self.count or len(sizes)), generator)


EVEN_SHARE = 0.75
"""Share of the inclusion probability that :class:`BalancedNodes` spreads evenly over a response."""


def every_node(rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
    """Select every position of the response."""
    return [(depth, 1.0) for depth in range(len(rollout.response_ids))]


@dataclass(frozen=True)
class UniformNodes:
    """Selects ``count`` positions of each response, all equally likely.

    Attributes:
        count: Number of positions, at least 1; all positions of shorter responses are selected.

    Examples:
        >>> import torch
        >>> from odp_callbacks.engine.prompts import Question
        >>> rollout = Rollout(Question("0", {}, torch.tensor([1])), tuple(range(8)), "", False)
        >>> [inclusion for _, inclusion in UniformNodes(2)(rollout, torch.Generator().manual_seed(0))]
        [0.25, 0.25]
    """

    count: int = 4

    def __post_init__(self) -> None:
        """Check the count."""
        _check_count(self.count)

    def __call__(self, rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
        """Select positions of a rollout."""
        length = len(rollout.response_ids)
        count = min(self.count, length)
        depths = torch.randperm(length, generator=generator)[:count].tolist()
        return [(depth, count / length) for depth in depths]


@dataclass(frozen=True)
class EntropyNodes:
    """Selects about ``count`` positions of each response, preferring those where the student's entropy is high.

    The inclusion probability is proportional to the entropy of the student's policy, up to 1. A tenth of it is
    distributed evenly, so that every position can be selected. Systematic sampling keeps the number of nodes within
    one of ``count``.

    Attributes:
        count: Expected number of positions, at least 1.
    """

    count: int = 4
    uses_entropy = True

    def __post_init__(self) -> None:
        """Check the count."""
        _check_count(self.count)

    def __call__(self, rollout: Rollout, generator: torch.Generator) -> list[tuple[int, float]]:
        """Select positions of a rollout with its ``entropy``."""
        assert rollout.entropy is not None
        entropy = rollout.entropy.double()
        total = float(entropy.sum())
        even = torch.full_like(entropy, 1 / len(entropy))
        share = 0.1 * even + 0.9 * (entropy / total if total > 0 else even)
        return systematic_sample(inclusion_probabilities(share, self.count), generator)


def systematic_sample(inclusion: torch.Tensor, generator: torch.Generator) -> list[tuple[int, float]]:
    """Draw places with the given inclusion probabilities, as evenly spaced along their sum as possible.

    Args:
        inclusion: ``(T,)`` float64, in [0, 1].
        generator: Random stream, on the CPU.

    Returns:
        The places and their probabilities; as many as the probabilities add up to, within one.
    """
    edges = inclusion.cumsum(0) - torch.rand((), generator=generator, dtype=torch.float64)
    selected = edges.ceil() - (edges - inclusion).ceil() >= 1
    return [(int(place), float(inclusion[place])) for place in selected.nonzero()]


def inclusion_probabilities(share: torch.Tensor, count: float) -> torch.Tensor:
    """Compute probabilities proportional to ``share`` that add up to ``count``, none above 1.

    Args:
        share: ``(T,)``, positive.
        count: The expected number of selected positions; all probabilities are 1 if it reaches ``T``.

    Examples:
        >>> inclusion_probabilities(torch.tensor([6.0, 1.0, 1.0]), 2)
        tensor([1.0000, 0.5000, 0.5000])
    """
    probabilities = torch.ones_like(share)
    is_below_one = torch.ones(len(share), dtype=torch.bool)
    while int(is_below_one.sum()) > (remaining_count := count - int((~is_below_one).sum())):
        scaled = share * remaining_count / share[is_below_one].sum()
        probabilities = torch.where(is_below_one, scaled, probabilities)
        if not (exceeds_one := is_below_one & (scaled > 1)).any():
            break
        probabilities[exceeds_one] = 1.0
        is_below_one &= ~exceeds_one
    return probabilities.clamp(max=1)


def _check_count(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"`count` must be a positive integer, but {count!r} was given.")


NODE_SELECTORS: dict[str, NodeSelector] = {
    "balanced": BalancedNodes(),
    "exponential": exponential_windows,
    "every": every_node,
    "uniform": UniformNodes(),
    "entropy": EntropyNodes(),
}
"""The node selectors that can be named in a configuration."""


def select_nodes(selector: NodeSelector, rollouts: list[Rollout], randomness: Randomness) -> list[Node]:
    """Apply a selector to every rollout.

    Args:
        selector: The node selector.
        rollouts: The probe's rollouts.
        randomness: Random draws; those of a rollout depend on its question and on its number among the question's.

    Returns:
        The nodes, by rollout and then by depth.

    Raises:
        ValueError: If the selector chooses a position outside the response, or returns an impossible probability.
    """
    nodes = []
    rollout_counts: Counter[int] = Counter()
    for rollout_index, rollout in enumerate(rollouts):
        question = rollout.question
        generator = randomness.generator(question.id, "nodes", rollout_counts[id(question)])
        rollout_counts[id(question)] += 1
        for depth, inclusion in sorted(call_with_user_defaults(selector, rollout, generator)):
            if not 0 <= depth < len(rollout.response_ids) or not 0 < inclusion <= 1:
                raise ValueError(
                    f"`nodes` must choose depths in [0, {len(rollout.response_ids)}) with a probability in (0, 1], "
                    f"but it gave {(depth, inclusion)!r}."
                )
            nodes.append(Node(rollout_index, depth, inclusion))
    return nodes


def group_by_question(
    rollouts: Sequence[Rollout], nodes: Sequence[Node]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield for each question the indices of its rollouts, and for each of these the depths of its nodes, in order."""
    depths: dict[int, list[int]] = {}
    for node in nodes:
        depths.setdefault(node.rollout, []).append(node.depth)
    rollouts_of_question: dict[int, list[int]] = {}
    for rollout_index in depths:
        rollouts_of_question.setdefault(id(rollouts[rollout_index].question), []).append(rollout_index)
    for rollout_indices in rollouts_of_question.values():
        yield rollout_indices, [depths[rollout_index] for rollout_index in rollout_indices]
