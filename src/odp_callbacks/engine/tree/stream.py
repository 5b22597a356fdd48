"""The continuations of a probe as one stream of requests, so that the batch stays full until the budget ends.

The stream is a sequence of waves (:mod:`~odp_callbacks.engine.tree.waves`). The first ones sample one continuation of
every branch, some questions after the others. A later wave is planned from the outcomes of all waves but the last one,
whose requests meanwhile keep the batch full. What is sampled is therefore a function of the seed and the questions: it
depends neither on the size of the batch nor on which continuation finishes first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from odp_callbacks.analysis.estimators import half_width
from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.backends import sample_stream
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
from odp_callbacks.engine.tree.wave_queue import WaveQueue
from odp_callbacks.engine.tree.waves import Wave, sort_by_length, sort_by_sequence, sort_randomly
from odp_callbacks.records import NodeRecord

USEFUL_SLOTS = {"cpu": 64}
"""Slots of the batch, at most, by the type of device. With 256 of them a token takes 5 to 20 % less time on a CPU, but
the stream then has more idle slots at its end, and more continuations that start in vain."""
MOST_QUESTION_BLOCKS = 8
"""The first continuations of all branches are sampled in at most this many waves, each of whole questions."""


class ContinuationStream:
    """Samples a probe's continuations, and times and reports them as one stage.

    Args:
        sampler: Plans and scores the continuations.
        generator: Random numbers for rounding allocations.
        timer: Times the stage ``"continuations"``, and what the verifier adds as ``"verifier"``.
        add_gradients: Completes records by the gradients of the nodes where outcomes differ. Only a half-width to stop
            at needs it between waves; the allocation must not depend on what a node's own outcomes were.
        deadline: When the continuations must have ended; None for no limit.
    """

    def __init__(
        self,
        sampler: ContinuationSampler,
        generator: np.random.Generator,
        timer: StageTimer,
        add_gradients: Callable[[Sequence[NodeRecord]], list[NodeRecord]] = list,
        deadline: Deadline | None = None,
    ) -> None:
        self.sampler, self.generator, self.timer, self.add_gradients = sampler, generator, timer, add_gradients
        self.deadline = Deadline() if deadline is None else deadline
        rollout_seconds = timer.seconds.get("rollouts", math.inf)
        speed = sum(len(rollout.response_ids) for rollout in sampler.tree.rollouts) / max(1e-9, rollout_seconds)
        self.budget = ContinuationBudget(sampler.config, sampler.cost, generator, self.deadline, speed)
        self._exploration: set[int] = set()

    def run(self, records: Sequence[NodeRecord]) -> list[list[BranchOutcomes]]:
        """Sample all continuations.

        Args:
            records: The records of the tree's nodes, without outcomes.

        Returns:
            The outcomes of the branches of each node.
        """
        sampler, config, cost = self.sampler, self.sampler.config, self.sampler.cost
        tree = sampler.tree
        if tree.first_nodes:
            verifier_seconds = cost.verifier_seconds
            with self.timer.growing_stage("continuations") as progress:
                first_waves = self.first_waves()
                self._exploration = {id(wave) for wave in first_waves}
                queue = WaveQueue(
                    sampler,
                    self.budget,
                    first_waves,
                    (lambda outstanding: self.next_waves(records, outstanding)) if config.adaptive else None,
                    progress,
                )
                sample_stream(
                    sampler.student,
                    sampler.prefilled,
                    queue,
                    temperature=config.temperature,
                    eos_token_ids=sampler.eos_token_ids,
                    batch_size=int(min(config.batch_size, useful_slots(next(sampler.student.parameters()).device))),
                    max_memory_bytes=config.max_memory_bytes,
                    deadline=self.deadline if self.deadline.is_finite else None,
                    slot_use=cost.slot_use,
                )
                queue.finish()
            self.timer.move("continuations", "verifier", cost.verifier_seconds - verifier_seconds)
        return [tree.node_outcomes(node_index) for node_index in range(len(records))]

    def first_waves(self) -> list[Wave]:
        """Plan what is known in advance: one continuation of every branch, or all of them if there is no budget."""
        sampler, blocks = self.sampler, self.question_blocks()
        counts = [1] if sampler.config.adaptive else [1, sampler.config.continuations - 1]
        waves = []
        for count in filter(None, counts):
            allocation = equal_allocation(sampler.tree, count).tolist()
            for block in blocks:
                is_last = not sampler.config.adaptive and count == counts[-1] and block is blocks[-1]
                ordering = sort_by_length if is_last else sort_by_sequence
                waves.append(sampler.plan(allocation, self.expected_lengths, groups=block, ordering=ordering))
        return waves

    def question_blocks(self) -> list[list[int]]:
        """Split the groups of the tree by question, in an order of questions that depends on nothing but the seed."""
        sampler, tree = self.sampler, self.sampler.tree
        by_question: dict[int, list[int]] = {}
        for group_index, first_node in enumerate(tree.first_nodes):
            by_question.setdefault(id(tree.rollouts[tree.nodes[first_node].rollout].question), []).append(group_index)

        def place(groups: list[int]) -> int:
            return sampler.randomness.key(tree.draw_names[groups[0]][0], "start")

        ordered = sorted(by_question.values(), key=place)
        parts = np.array_split(np.arange(len(ordered)), min(MOST_QUESTION_BLOCKS, len(ordered)))
        return [[group for question in part for group in ordered[question]] for part in parts]

    @property
    def expected_lengths(self) -> NDArray[np.float64]:
        """``(G,)``, tokens of a continuation from each group, as the rollouts let expect."""
        tree = self.sampler.tree
        return np.array([remaining_length(tree.rollouts, tree.nodes[first].depth) for first in tree.first_nodes])

    def next_waves(self, records: Sequence[NodeRecord], outstanding: Sequence[Wave]) -> list[Wave]:
        """Plan one more wave, or those that spend the rest of the budget; none if nothing is left to sample.

        Args:
            records: The records of the tree's nodes, without outcomes.
            outstanding: Waves whose outcomes are not in the tree yet.
        """
        sampler = self.sampler
        with np.errstate(divide="ignore", invalid="ignore"):  # nodes without rewards have no mean reward
            state = self.read_state(records, outstanding)
            if not len(state.group):
                return []
            expected_tokens = sum(state.cost[group] for wave in outstanding for group, _ in wave.branches)
            plan = self.budget.next_wave(state, expected_tokens)
        allocation, reserve = plan.allocation.tolist(), plan.reserve.tolist()
        ordering = sort_by_length if plan.is_last else sort_by_sequence
        # At a deadline an unfinished wave is lost. Several small ones then lose less.
        parts = self.question_blocks() if self.deadline.is_finite else [None]
        limit = plan.token_limit
        waves = [
            sampler.plan(allocation, state.cost, token_limit=limit, groups=part, ordering=ordering) for part in parts
        ]
        if plan.reserve.any():
            random_order = sort_randomly(self.generator)
            waves.append(sampler.plan(reserve, state.cost, token_limit=limit, ordering=random_order))
        waves = [wave for wave in waves if wave.requests]
        if waves:
            waves[-1].is_last = plan.is_last
        return waves

    def read_state(self, records: Sequence[NodeRecord], outstanding: Sequence[Wave]) -> AllocationState:
        """Read from the tree what is known before a wave.

        Nodes that are still waiting for their first rewards count as nodes without any; those with a branch that the
        reward function gave none are left out.
        """
        sampler, tree = self.sampler, self.sampler.tree
        pending = np.zeros((len(tree.branches), max(map(len, tree.branches))))
        for wave in outstanding:
            np.add.at(pending, tuple(np.array(wave.branches, dtype=np.int64).reshape(-1, 2).T), 1)
        unexplored = {group for wave in outstanding if id(wave) in self._exploration for group in wave.groups}
        current_records = [
            with_outcomes(record, tree.node_outcomes(node_index)) for node_index, record in enumerate(records)
        ]
        usable = [
            node_index
            for node_index, record in enumerate(current_records)
            if tree.group_of_node[node_index] in unexplored or is_scored(record)
        ]
        evidence = gather([current_records[node_index] for node_index in usable], logits=True)
        is_unexplored = np.array([tree.group_of_node[node_index] in unexplored for node_index in usable], dtype=bool)
        evidence = without_rewards(evidence, is_unexplored)
        state = read_allocation_state(tree, evidence, self.expected_lengths, usable, pending)
        for group_index, branches in enumerate(tree.branches):
            for branch_index in range(len(branches)):
                state.open[group_index, branch_index] &= not sampler.ends_response(group_index, branch_index)
        if sampler.config.half_width is None or unexplored or not usable:
            return state
        completed = self.add_gradients(current_records)
        measured = gather([completed[node_index] for node_index in usable])
        return replace(state, half_width=half_width(measured, sampler.config.target))


def without_rewards(evidence: Evidence, chosen: NDArray[np.bool_]) -> Evidence:
    """Return the evidence with no reward at the chosen nodes, ``(N,)``."""
    missing = chosen[:, None] & evidence.real
    count, total, total_square = (
        np.where(missing, 0.0, values) for values in (evidence.count, evidence.total, evidence.total_square)
    )
    return replace(evidence, count=count, total=total, total_square=total_square)


def useful_slots(device: torch.device) -> int | float:
    """Slots that a batch of continuations uses at most; infinite where more of them are always faster.

    Examples:
        >>> import torch
        >>> useful_slots(torch.device("cpu"))
        64
    """
    return USEFUL_SLOTS.get(device.type, math.inf)
