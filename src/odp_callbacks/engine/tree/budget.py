"""Spending a budget of continuations in rounds: one for each branch first, then more where they help the most.

After each round, the continuations of the next one go to the branches where they narrow the interval of the target
figure most (:mod:`odp_callbacks.engine.tree.allocation`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import half_width
from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.tree.allocation import allocate, sensitivities
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.continuations import ContinuationCost
from odp_callbacks.records import Floats

ROUND_SHARE = 1 / 3
"""Share of the remaining budget that one round may spend."""
NEGLIGIBLE_SHARE = 0.02
"""Share of a budget that is not worth another round."""
PRIOR_CONTINUATIONS = 2
"""Number of continuations that the length expected in advance counts for in an estimated length."""


@dataclass(frozen=True)
class AllocationState:
    """What is known between two rounds about ``N`` nodes in ``G`` groups with at most ``A`` branches.

    Attributes:
        evidence: The evidence of all nodes.
        group: ``(N,)``, the group of each node.
        have: ``(G, A)``, number of continuations of each branch.
        open: ``(G, A)`` bool, whether more continuations of the branch would be informative.
        cost: ``(G,)``, expected number of tokens of one continuation.
    """

    evidence: Evidence
    group: NDArray[np.int64]
    have: Floats
    open: NDArray[np.bool_]
    cost: Floats


def read_allocation_state(
    tree: ContinuationTree, evidence: Evidence, expected_lengths: Floats, scored: Sequence[int] | None = None
) -> AllocationState:
    """Read the allocation state from a tree.

    Args:
        tree: The prefixes, with their outcomes.
        evidence: The evidence of the nodes in ``scored``.
        expected_lengths: ``(G,)``, the length of a continuation from each group that was expected in advance. It
            counts for :data:`PRIOR_CONTINUATIONS` continuations.
        scored: Indices of the nodes whose branches all have rewards; None for all nodes.
    """
    group_shape = len(tree.branches), max(map(len, tree.branches), default=0)
    have, is_open = np.ones(group_shape), np.zeros(group_shape, bool)
    for group_index, outcomes in enumerate(tree.outcomes):
        have[group_index, : len(outcomes)] = [len(outcome.rewards) for outcome in outcomes]
        is_open[group_index, : len(outcomes)] = [not outcome.exact for outcome in outcomes]
    cost = np.array(
        [
            (PRIOR_CONTINUATIONS * expected + tokens) / (PRIOR_CONTINUATIONS + count)
            for expected, (tokens, count) in zip(expected_lengths, tree.sampled_lengths, strict=True)
        ]
    )
    group = np.array(tree.group_of_node, dtype=np.int64)
    group = group if scored is None else group[np.array(scored, dtype=np.int64)]
    return AllocationState(evidence, group, have, is_open, cost.clip(min=1))


def equal_allocation(tree: ContinuationTree, count: int) -> NDArray[np.int64]:
    """Allocate ``count`` continuations to every branch, ``(G, A)``."""
    largest_group = max(map(len, tree.branches), default=0)
    return np.array(
        [
            [count * int(branch_index < len(branches)) for branch_index in range(largest_group)]
            for branches in tree.branches
        ],
        dtype=np.int64,
    )


class ContinuationBudget:
    """A budget of tokens, seconds or both, and the decision where its continuations go.

    The clock starts when the object is created.

    Args:
        config: Budget, time budget, target and half-width.
        cost: What continuations have cost so far. The sampler updates it; this object only reads it.
        generator: Random numbers for rounding allocations.
    """

    def __init__(self, config: ProbeConfig, cost: ContinuationCost, generator: np.random.Generator) -> None:
        self.config, self.cost, self.generator = config, cost, generator
        self._start = time.perf_counter()

    def total_tokens(self) -> float:
        """Return the whole budget in tokens; a time budget is converted at the speed of sampling so far."""
        limits = []
        if self.config.budget:
            limits.append(float(self.config.budget))
        if self.config.time_budget is not None and self.cost.tokens:
            elapsed = max(time.perf_counter() - self._start, 1e-9)
            limits.append(self.config.time_budget * self.cost.tokens / elapsed)
        return min(limits, default=0.0)

    def remaining_tokens(self) -> float:
        """Return the number of tokens that remain, or 0 if they are not worth another round."""
        total = self.total_tokens()
        remaining = total - self.cost.tokens
        return remaining if remaining > NEGLIGIBLE_SHARE * total else 0.0

    def planned_continuations(self) -> int:
        """Return how many continuations there will be in all, as far as known: the half-width may be met before."""
        if not self.cost.tokens:
            return 0
        return round(self.total_tokens() / self.cost.tokens * self.cost.continuations)

    def next_round(self, state: AllocationState) -> NDArray[np.int64]:
        """Allocate the next round's continuations, ``(G, A)``; all zero if none are left to sample.

        Args:
            state: What is known after the previous round.
        """
        wanted_half_width = self.config.half_width
        if wanted_half_width is not None and half_width(state.evidence, self.config.target) <= wanted_half_width:
            return np.zeros(state.have.shape, dtype=np.int64)
        remaining = self.remaining_tokens()
        scores = np.where(state.open, _scores(state, self.config.target), 0)
        if not scores.any():
            # Every teacher equals the student at every node, so that all branches matter alike.
            scores = state.open.astype(float)
        is_last_round = remaining < 4 * NEGLIGIBLE_SHARE * self.total_tokens()
        tokens = remaining if is_last_round else ROUND_SHARE * remaining
        if wanted_half_width is not None:
            # At most double what has been sampled, then check whether the interval is narrow enough.
            tokens = min(tokens, self.cost.tokens)
        cost = np.broadcast_to(state.cost[:, None], scores.shape)
        return allocate(scores, cost, state.have, tokens, self.generator)


def _scores(state: AllocationState, target: str) -> Floats:
    """Sensitivity times standard deviation of a reward, ``(G, A)``, over all teachers and the nodes of a group."""
    model = fit_success_model(state.evidence)
    by_node = sensitivities(state.evidence, model, target)
    by_group = np.zeros((len(state.have), *by_node.shape[1:]))
    np.add.at(by_group, state.group, by_node)
    spread = np.zeros((len(state.have), by_node.shape[-1]))
    np.add.at(spread, state.group, model.leave_one_out_spread(state.evidence.question, state.group))
    node_counts = np.bincount(state.group, minlength=len(state.have)).clip(min=1)[:, None]
    scores = np.sqrt((by_group**2).sum(axis=1)) * spread / node_counts
    # Nodes whose branches are not all scored are not in the evidence, and may be those with the most branches.
    return np.pad(scores, ((0, 0), (0, state.have.shape[1] - scores.shape[1])))
