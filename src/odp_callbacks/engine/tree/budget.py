"""Spending a budget of continuations in waves: one for each branch first, then more where they help the most.

The continuations of a later wave go to the branches where they narrow the interval of the target figure most
(:mod:`odp_callbacks.engine.tree.allocation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import Evidence
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.tree.allocation import allocate, sensitivities
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.continuations import ContinuationCost
from odp_callbacks.engine.tree.quiet_questions import quiet_shares
from odp_callbacks.records import Floats

WAVE_SHARE = 1 / 3
"""Share of the remaining budget that one wave may spend."""
LAST_SHARE = 0.4
"""Share of a budget that the last wave may spend; with fewer and larger waves the batch stays full."""
NEGLIGIBLE_SHARE = 0.02
"""Share of a budget that is not worth another wave."""
CERTAIN_SHARE = 0.8
"""Share of the remaining tokens for which the last wave's continuations are planned for sure."""
RESERVE_SHARE = 0.6
"""Share of the remaining and of the outstanding tokens for which further continuations stand by, to be sampled while
the budget lasts."""
SPEED_MARGIN = 0.9
"""Share of the tokens that the speed so far allows until a deadline which are counted on."""
SAFE_SHARE = 0.5
"""Share of the remaining time in which the longest possible continuation must fit, if it decides what may count."""
PRIOR_CONTINUATIONS = 2
"""Number of continuations that the length expected in advance counts for in an estimated length."""


@dataclass(frozen=True)
class AllocationState:
    """What is known before a wave about ``N`` nodes in ``G`` groups with at most ``A`` branches.

    Attributes:
        evidence: The evidence of all nodes, with their gradients on the logits, which are known before any outcome.
        group: ``(N,)``, the group of each node.
        have: ``(G, A)``, number of continuations of each branch, those included that are being sampled.
        open: ``(G, A)`` bool, whether more continuations of the branch would be informative.
        cost: ``(G,)``, expected number of tokens of one continuation.
        half_width: Half-width of the target figure so far; infinite where it is not known.
    """

    evidence: Evidence
    group: NDArray[np.int64]
    have: Floats
    open: NDArray[np.bool_]
    cost: Floats
    half_width: float = float("inf")


@dataclass(frozen=True)
class PlannedContinuations:
    """The continuations of the next wave, ``(G, A)`` each.

    Attributes:
        allocation: Number of continuations to add to each branch.
        reserve: Further continuations, which follow in random order until the budget is spent.
        token_limit: The budget in tokens, as known now.
        is_last: Whether no other wave will follow.
    """

    allocation: NDArray[np.int64]
    reserve: NDArray[np.int64]
    token_limit: float
    is_last: bool


def read_allocation_state(
    tree: ContinuationTree,
    evidence: Evidence,
    expected_lengths: Floats,
    scored: Sequence[int] | None = None,
    pending: Floats | None = None,
) -> AllocationState:
    """Read the allocation state from a tree.

    Args:
        tree: The prefixes, with their outcomes.
        evidence: The evidence of the nodes in ``scored``.
        expected_lengths: ``(G,)``, the length of a continuation from each group that was expected in advance. It
            counts for :data:`PRIOR_CONTINUATIONS` continuations.
        scored: Indices of the nodes whose branches all have rewards; None for all nodes.
        pending: ``(G, A)``, number of continuations of each branch that are being sampled; None for none.
    """
    group_shape = len(tree.branches), max(map(len, tree.branches), default=0)
    have, is_open = np.ones(group_shape), np.zeros(group_shape, bool)
    for group_index, outcomes in enumerate(tree.outcomes):
        have[group_index, : len(outcomes)] = [len(outcome.rewards) for outcome in outcomes]
        is_open[group_index, : len(outcomes)] = [not outcome.exact for outcome in outcomes]
    have = have if pending is None else have + pending
    sampled_tokens, counts = np.array(tree.sampled_lengths, dtype=float).reshape(-1, 2).T
    # Few rollouts say how long a continuation is, and their error is common to all groups.
    expected_tokens = (expected_lengths * counts).sum()
    prior_tokens = PRIOR_CONTINUATIONS * expected_lengths.mean() if len(expected_lengths) else 0.0
    correction = (sampled_tokens.sum() + prior_tokens) / max(1e-9, expected_tokens + prior_tokens)
    cost = (PRIOR_CONTINUATIONS * correction * expected_lengths + sampled_tokens) / (PRIOR_CONTINUATIONS + counts)
    group = np.array(tree.group_of_node, dtype=np.int64)
    group = group if scored is None else group[np.array(scored, dtype=np.int64)]
    is_open[_is_closed(tree, evidence, group)] = False
    return AllocationState(evidence, group, have, is_open, cost.clip(min=1))


def _is_closed(tree: ContinuationTree, evidence: Evidence, group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a group needs no more continuations: its question is quiet, and outcomes differ in no other, ``(G,)``."""
    shares = quiet_shares(tree.rollouts)
    question_of_group = [id(tree.rollouts[tree.nodes[first].rollout].question) for first in tree.first_nodes]
    differ = {question_of_group[place] for place in group[(evidence.offset != 0).any(axis=1)]}
    return np.array([shares[question] < 1 and not differ - {question} for question in question_of_group], dtype=bool)


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
        config: Budget, target and half-width.
        cost: What continuations have cost whose outcomes are known. The sampler updates it; this object only reads it.
        generator: Random numbers for rounding allocations.
        deadline: When sampling must have ended; None for no limit.
        expected_speed: Tokens a second, before any continuation has finished; 0 if nothing is known.

    Attributes:
        sampled_tokens: Tokens of the continuations that have finished since the clock started.
        sampled: Number of these continuations.
        stored_tokens: Tokens of the continuations that a journal had.
        running: Number of continuations that have started and not finished.
    """

    def __init__(
        self,
        config: ProbeConfig,
        cost: ContinuationCost,
        generator: np.random.Generator,
        deadline: Deadline | None = None,
        expected_speed: float = 0.0,
    ) -> None:
        self.config, self.cost, self.generator, self.expected_speed = config, cost, generator, expected_speed
        self.deadline = Deadline() if deadline is None else deadline
        self.sampled_tokens = self.sampled = self.stored_tokens = self.running = 0
        self._start = self.deadline.elapsed_seconds

    def total_tokens(self) -> float:
        """Return the whole budget in tokens; the time until a deadline is converted at the speed so far."""
        limits = []
        if self.config.budget:
            limits.append(float(self.config.budget))
        if self.deadline.is_finite and self.sampled_tokens:
            coming_tokens = SPEED_MARGIN * self._tokens_in_time()
            limits.append(self.stored_tokens + self.sampled_tokens + coming_tokens)
        return min(limits, default=0.0)

    def has_time_for(self, tokens: float) -> bool:
        """Whether so many tokens, in addition to half of what is running, can be sampled before the deadline."""
        return not self.deadline.is_finite or tokens + self._running_tokens() <= self._tokens_in_time()

    def has_time_for_steps(self, steps: int, steps_done: int) -> bool:
        """Whether so many steps of the model end well before the deadline, if they take as long as those so far."""
        if steps <= 0 or not self.deadline.is_finite:
            return True
        elapsed = self.deadline.elapsed_seconds - self._start
        return steps * elapsed / max(1, steps_done) <= SAFE_SHARE * self.deadline.remaining_seconds

    def _tokens_in_time(self) -> float:
        """Tokens that can be sampled until the deadline, at the speed so far."""
        elapsed = max(self.deadline.elapsed_seconds - self._start, 1e-9)
        speed = (self.sampled_tokens + self._running_tokens()) / elapsed if self.sampled else self.expected_speed
        return speed * self.deadline.remaining_seconds

    def _running_tokens(self) -> float:
        """Tokens that unfinished continuations have so far, and will still take, on average."""
        return self.running * self.sampled_tokens / max(1, self.sampled) / 2

    def planned_continuations(self) -> int:
        """Return how many continuations there will be in all, as far as known: the half-width may be met before."""
        if not self.cost.tokens:
            return 0
        return round(self.total_tokens() / self.cost.tokens * self.cost.continuations)

    def next_wave(self, state: AllocationState, outstanding: float = 0.0) -> PlannedContinuations:
        """Plan the next wave; it is empty if nothing is left to sample.

        Args:
            state: What is known.
            outstanding: Expected number of tokens of the continuations whose outcomes are not known yet.
        """
        total, wanted_half_width = self.total_tokens(), self.config.half_width
        spent = self.cost.tokens + outstanding
        remaining = total - spent
        nothing = np.zeros(state.have.shape, dtype=np.int64)
        is_narrow = wanted_half_width is not None and state.half_width <= wanted_half_width
        # What is not known yet may take less than it is expected to.
        if is_narrow or remaining + RESERVE_SHARE * outstanding <= NEGLIGIBLE_SHARE * total:
            return PlannedContinuations(nothing, nothing, total, is_last=True)
        scores = np.where(state.open, _scores(state, self.config.target), 0)
        if not scores.any():
            # Every teacher equals the student at every node, so that all branches matter alike.
            scores = state.open.astype(float)
        cost = np.broadcast_to(state.cost[:, None], scores.shape)

        def add(have: Floats, tokens: float) -> NDArray[np.int64]:
            return allocate(scores, cost, have, tokens, self.generator)

        # With a half-width to stop at, the last waves are small, and none more than doubles what has been sampled.
        last_share = LAST_SHARE if wanted_half_width is None else 4 * NEGLIGIBLE_SHARE
        if remaining > last_share * total:
            tokens = WAVE_SHARE * remaining
            tokens = tokens if wanted_half_width is None else min(tokens, spent)
            return PlannedContinuations(add(state.have, tokens), nothing, total, is_last=False)
        allocation = add(state.have, CERTAIN_SHARE * remaining)
        reserve = add(state.have + allocation, RESERVE_SHARE * (max(0.0, remaining) + outstanding))
        return PlannedContinuations(allocation, reserve, total, is_last=True)


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
