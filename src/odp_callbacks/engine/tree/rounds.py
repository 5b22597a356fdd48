"""The continuations of a probe, sampled in one round or within a budget in several."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.tree.budget import (
    AllocationState,
    ContinuationBudget,
    equal_allocation,
    read_allocation_state,
)
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes
from odp_callbacks.engine.tree.continuations import ContinuationSampler
from odp_callbacks.engine.tree.planning import remaining_length
from odp_callbacks.engine.tree.recording import is_scored, with_outcomes
from odp_callbacks.records import NodeRecord


class SamplingRounds:
    """Samples a probe's continuations in rounds, and times and reports them as one stage.

    Args:
        sampler: Samples and scores the continuations.
        generator: Random numbers for rounding allocations.
        timer: Times the rounds as the stage ``"continuations"`` and what the verifier adds as ``"verifier"``.
    """

    def __init__(self, sampler: ContinuationSampler, generator: np.random.Generator, timer: StageTimer) -> None:
        self.sampler, self.timer = sampler, timer
        self.budget = ContinuationBudget(sampler.config, sampler.cost, generator)
        self._allocated = 0

    def run(self, records: Sequence[NodeRecord]) -> list[list[BranchOutcomes]]:
        """Sample all rounds.

        Args:
            records: The records of the tree's nodes, without outcomes.

        Returns:
            The outcomes of the branches of each node.
        """
        tree, config = self.sampler.tree, self.sampler.config
        if not config.adaptive:
            self.sample_round(equal_allocation(tree, config.continuations))
        elif tree.first_nodes:
            self.sample_round(equal_allocation(tree, 1))
            while self.budget.remaining_tokens():
                state = self.read_state(records)
                if not len(state.group):
                    break
                allocation = self.budget.next_round(state)
                if not allocation.any():
                    break
                self.sample_round(allocation)
        return [tree.node_outcomes(node_index) for node_index in range(len(records))]

    def sample_round(self, allocation: NDArray[np.int64]) -> None:
        """Sample one round.

        Args:
            allocation: ``(G, A)``, the number of continuations to add to each branch of each group.
        """
        cost = self.sampler.cost
        verifier_seconds = cost.verifier_seconds
        part = range(self._allocated, self._allocated + int(allocation.sum()))
        self._allocated = part.stop
        total = max(part.stop, self.budget.planned_continuations())
        with self.timer.stage("continuations", total, part) as progress:
            self.sampler.sample(allocation.tolist(), progress)
        self.timer.move("continuations", "verifier", cost.verifier_seconds - verifier_seconds)

    def read_state(self, records: Sequence[NodeRecord]) -> AllocationState:
        """Read from the tree what is known before the next round; nodes with a branch without rewards are left out."""
        tree = self.sampler.tree
        current_records = [
            with_outcomes(record, tree.node_outcomes(node_index)) for node_index, record in enumerate(records)
        ]
        expected_lengths = np.array(
            [remaining_length(tree.rollouts, tree.nodes[first_node].depth) for first_node in tree.first_nodes]
        )
        scored = [node_index for node_index, record in enumerate(current_records) if is_scored(record)]
        evidence = gather([current_records[node_index] for node_index in scored])
        return read_allocation_state(tree, evidence, expected_lengths, scored)
