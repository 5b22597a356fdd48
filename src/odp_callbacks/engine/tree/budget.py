"""Spending a budget of continuations in rounds: explore, then put them where they narrow the wanted interval most."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.allocation import allocate, sensitivities
from odp_callbacks.engine.tree.continuations import ContinuationCost, ContinuationTree
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.records import Floats

ROUND = 1 / 3
"""Share of what is left that goes into a round before it is looked where the next should go."""
CLOSE = 0.02
"""Share of a budget that is not worth another round."""
EXPLORE = 0.5
"""Share of the budget that one continuation a branch may take; nodes are drawn if all of them would take more."""

Sample = Callable[[NDArray[np.int64]], None]
"""Adds as many continuations to each group and branch ``(G, A)`` to the tree."""


@dataclass(frozen=True)
class AllocationState:
    """What is known between two rounds; ``G`` prefixes, ``A`` branches at the most.

    Attributes:
        evidence: Of all ``N`` nodes.
        group: ``(N,)``, the prefix of each node.
        have: ``(G, A)``, continuations of each branch.
        open: ``(G, A)`` bool: more of them would tell more.
        cost: ``(G,)``, tokens that one of them is expected to take.
    """

    evidence: Evidence
    group: NDArray[np.int64]
    have: Floats
    open: NDArray[np.bool_]
    cost: Floats


def remaining_length(rollouts: Sequence[Rollout], depth: int) -> float:
    """Tokens that a continuation from ``depth`` is expected to take after its first, from the rollouts' lengths."""
    longer = [len(r.response_ids) - depth - 1 for r in rollouts if len(r.response_ids) > depth]
    return max(1.0, float(np.mean(longer)) if longer else 1.0)


def subsample_nodes(
    nodes: Sequence[Node], tree: ContinuationTree, cost: float, budget: float, generator: np.random.Generator
) -> list[Node]:
    """Draw nodes if one continuation a branch would take too much of the budget.

    Args:
        nodes: All nodes.
        tree: Their prefixes, with branches.
        cost: Tokens that one continuation of every branch is expected to take.
        budget: In tokens.
        generator: Draws.

    Returns:
        The nodes that stay, their inclusion probabilities reduced accordingly.
    """
    groups = len(tree.first)
    if groups == 0:
        return []
    keep = min(groups, max(1, int(groups * EXPLORE * budget / cost))) if cost > 0 else groups
    if keep == groups:
        return list(nodes)
    kept = set(generator.permutation(groups)[:keep].tolist())
    return [
        replace(node, inclusion=node.inclusion * keep / groups) for n, node in enumerate(nodes) if tree.group[n] in kept
    ]


def read_allocation_state(tree: ContinuationTree, evidence: Evidence, expected: Floats) -> AllocationState:
    """Read a tree; the length expected before anything was sampled counts as two continuations."""
    size = max(map(len, tree.branches), default=0)
    have, open_ = np.ones((len(tree.branches), size)), np.zeros((len(tree.branches), size), bool)
    for g, row in enumerate(tree.outcomes):
        have[g, : len(row)] = [len(outcome.rewards) for outcome in row]
        open_[g, : len(row)] = [not outcome.exact for outcome in row]
    cost = np.array([(2 * e + tokens) / (2 + n) for e, (tokens, n) in zip(expected, tree.length, strict=True)])
    return AllocationState(evidence, np.array(tree.group), have, open_, cost.clip(min=1))


def spend_budget(
    config: ProbeConfig,
    first: NDArray[np.int64],
    spent: ContinuationCost,
    sample: Sample,
    seen: Callable[[], AllocationState],
    width: Callable[[Evidence], float],
    generator: np.random.Generator,
) -> None:
    """Sample continuations until the budget is spent, the time is over, or the interval is narrow enough.

    Args:
        config: Budget, target and half-width.
        first: ``(G, A)``, the continuations of the first round.
        spent: What continuations have cost; ``sample`` adds to it.
        sample: Samples.
        seen: What is known so far.
        width: Largest half-width of the target figure among the teachers.
        generator: Rounds.
    """
    start = time.perf_counter()
    sample(first)
    while left := _left(config, spent, time.perf_counter() - start):
        now = seen()
        if config.half_width is not None and width(now.evidence) <= config.half_width:
            return
        score = np.where(now.open, _score(now, config.target), 0)
        if not score.any():
            # No teacher has a say anywhere: all alike.
            score = now.open.astype(float)
        last = left < 4 * CLOSE * _total(config, spent, time.perf_counter() - start)
        cost = np.broadcast_to(now.cost[:, None], score.shape)
        tokens = left if last else ROUND * left
        if config.half_width is not None:
            tokens = min(tokens, spent.tokens)  # double what there is, and look whether it suffices
        more = allocate(score, cost, now.have, tokens, generator)
        if not more.any():
            return
        sample(more)


def planned_continuations(config: ProbeConfig, spent: ContinuationCost, seconds: float) -> int:
    """How many continuations there will be in all, as far as it is known; an interval may be narrow enough before."""
    if not spent.tokens:
        return 0
    return round(_total(config, spent, seconds) / spent.tokens * spent.continuations)


def _total(config: ProbeConfig, spent: ContinuationCost, seconds: float) -> float:
    """The budget in tokens, as far as it is known."""
    limits = []
    if config.budget:
        limits.append(float(config.budget))
    if config.seconds is not None and spent.tokens:
        limits.append(config.seconds * spent.tokens / max(seconds, 1e-9))
    return min(limits, default=0.0)


def _left(config: ProbeConfig, spent: ContinuationCost, seconds: float) -> float:
    """Tokens left to spend; 0 where they are not worth another round."""
    total = _total(config, spent, seconds)
    left = total - spent.tokens
    return left if left > CLOSE * total else 0.0


def _score(seen: AllocationState, target: str) -> Floats:
    """Sensitivity times spread of a reward, ``(G, A)``, over all teachers; nodes that share continuations add up."""
    model = fit_success_model(seen.evidence)
    by_node = sensitivities(seen.evidence, model, target)
    total = np.zeros((len(seen.have), *by_node.shape[1:]))
    np.add.at(total, seen.group, by_node)
    spread = np.zeros((len(seen.have), by_node.shape[-1]))
    np.add.at(spread, seen.group, model.spread_without_own(seen.evidence.question, seen.group))
    nodes = np.bincount(seen.group, minlength=len(seen.have))[:, None]
    found: Floats = np.sqrt((total**2).sum(axis=1)) * spread / nodes
    return found
