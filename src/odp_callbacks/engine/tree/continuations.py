"""Targeted continuations: sampling responses from chosen branches and scoring them, to measure each branch's success.

A wave of continuations is planned, sampled, scored, and added to the tree;
:mod:`~odp_callbacks.engine.tree.stream` runs the waves.
"""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.rollouts import response_text
from odp_callbacks.engine.sampling.backends import PrefilledRollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.sampling.request_source import SlotUse
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes, ContinuationTree, Response
from odp_callbacks.engine.tree.waves import BranchIndex, Ordering, Wave, sort_by_sequence
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.records import Floats


@dataclass
class ContinuationCost:
    """What the continuations of a probe have cost so far.

    Attributes:
        tokens: Number of sampled tokens.
        continuations: Number of continuations.
        truncated: Number of continuations that the length limit cut.
        unscored: Number of continuations and endings that got no reward.
        is_cut: Whether a deadline ended the continuations before all that were planned were complete.
        cut: Number of continuations that count nowhere, because a deadline left one of their wave unfinished.
        verifier_seconds: Time spent waiting for the verifier.
        slot_use: How full the batch was.
    """

    tokens: int = 0
    continuations: int = 0
    truncated: int = 0
    unscored: int = 0
    is_cut: bool = False
    cut: int = 0
    verifier_seconds: float = 0.0
    slot_use: SlotUse = field(default_factory=SlotUse)


@dataclass(frozen=True)
class ContinuationSampler:
    """Samples continuations from the branches of a tree and adds their rewards to it.

    Attributes:
        student: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        verifier: Scores the responses.
        prefilled: The sequences of rollouts.
        tree: The tree that is sampled from and added to.
        config: The probe's configuration.
        eos_token_ids: Tokens that end a response.
        randomness: Random draws. Those of a continuation depend on its question, its prefix, its branch's token and
            its number among the branch's continuations.
        journal: Stores continuations as they finish; those that it holds already are not sampled again.
        cost: What has been sampled so far.
        sequences: Place in ``prefilled`` of each rollout with nodes, by its index in the tree; None if all are there.
    """

    student: nn.Module
    tokenizer: Any
    verifier: Verifier
    prefilled: PrefilledRollouts
    tree: ContinuationTree
    config: ProbeConfig
    eos_token_ids: Sequence[int]
    randomness: Randomness
    journal: Journal | None = None
    cost: ContinuationCost = field(default_factory=ContinuationCost)
    sequences: Mapping[int, int] | None = None

    def plan(
        self,
        allocation: Sequence[Sequence[int]],
        expected_lengths: Sequence[float] | Floats,
        *,
        token_limit: float = math.inf,
        groups: Collection[int] | None = None,
        ordering: Ordering = sort_by_sequence,
    ) -> Wave:
        """Turn an allocation into a wave, and count its continuations as started in the tree.

        A branch that ends the response (with an end token, or with the last token that the limit allows) is scored
        once, and its success is then known exactly.

        Args:
            allocation: For each group and branch, the number of continuations to add.
            expected_lengths: For each group, the expected number of tokens of a continuation.
            token_limit: Tokens of this and all earlier waves after which the wave ends.
            groups: The groups that the wave is about; None for all.
            ordering: The order in which the requests start.
        """
        tree = self.tree
        chosen_groups = frozenset(range(len(tree.first_nodes)) if groups is None else groups)
        wave = Wave(self.verifier.open(), chosen_groups, token_limit=token_limit)
        planned: list[tuple[ContinuationRequest, BranchIndex, int, float]] = []
        for group_index in sorted(chosen_groups):
            node = tree.nodes[tree.first_nodes[group_index]]
            prefix_length = len(tree.rollouts[node.rollout].question.prompt_ids) + node.depth
            max_new_tokens = self.config.max_new_tokens - node.depth - 1
            started_counts = tree.continuations_started[group_index]
            sequence = node.rollout if self.sequences is None else self.sequences[node.rollout]
            expected = min(expected_lengths[group_index], max_new_tokens)
            for branch_index, branch in enumerate(tree.branches[group_index]):
                if self.ends_response(group_index, branch_index):
                    if tree.continuations_started[group_index][branch_index] == 0:
                        wave.ending_branches.append((group_index, branch_index))
                        started_counts[branch_index] = 1
                    continue
                for _ in range(allocation[group_index][branch_index]):
                    request = ContinuationRequest(sequence, prefix_length, branch.token, max_new_tokens)
                    key = self.randomness.key(tree.draw_names[group_index], branch.token, started_counts[branch_index])
                    planned.append((request, (group_index, branch_index), key, expected))
                    started_counts[branch_index] += 1
        requests = [request for request, _, _, _ in planned]
        for place in ordering(requests, [expected for _, _, _, expected in planned]):
            request, branch_of_request, key, expected = planned[place]
            wave.requests.append(request)
            wave.branches.append(branch_of_request)
            wave.keys.append(key)
            wave.expected_lengths.append(expected)
        for number, (group_index, branch_index) in enumerate(wave.ending_branches):
            self.submit(wave, number, (group_index, branch_index), ())
        return wave

    def ends_response(self, group_index: int, branch_index: int) -> bool:
        """Whether a branch ends the response, so that nothing follows it."""
        tree = self.tree
        node = tree.nodes[tree.first_nodes[group_index]]
        token = tree.branches[group_index][branch_index].token
        return token in self.eos_token_ids or node.depth + 1 == self.config.max_new_tokens

    def finish(self, wave: Wave, index: int, continuation: Continuation) -> None:
        """Keep a finished continuation of a wave, and submit it to the verifier."""
        wave.finish(index, continuation)
        self.submit(wave, len(wave.ending_branches) + index, wave.branches[index], continuation.tokens)

    def submit(self, wave: Wave, number: int, branch: BranchIndex, suffix: Response) -> None:
        """Submit the response that starts with a branch and goes on with ``suffix``."""
        tree, (group_index, branch_index) = self.tree, branch
        node_index = tree.first_nodes[group_index]
        response = (*tree.prefix(node_index), tree.branches[group_index][branch_index].token, *suffix)
        wave.responses[number] = response
        question = tree.rollouts[tree.nodes[node_index].rollout].question
        text = response_text(self.tokenizer, response, self.eos_token_ids)
        wave.scoring.add(number, question, text, response)

    def add_outcomes(self, wave: Wave) -> None:
        """Add the outcomes of a wave that is closed to the tree, and its cost to the total; waits for the verifier."""
        tree, cost = self.tree, self.cost
        start = time.perf_counter()
        rewards = wave.scoring.rewards()
        cost.verifier_seconds += time.perf_counter() - start
        for number, (group_index, branch_index) in enumerate(wave.ending_branches):
            # This replaces the rewards of continuations that passed here: they sampled what is known exactly now.
            known = [] if math.isnan(rewards[number]) else [rewards[number]]
            tree.outcomes[group_index][branch_index] = BranchOutcomes(known, [0] * len(known), True)
            cost.unscored += not known
        # Not in the order in which they started, which depends on the other questions of the probe.
        for index in sorted(range(wave.counted), key=wave.branches.__getitem__):
            (group_index, branch_index), number = wave.branches[index], len(wave.ending_branches) + index
            continuation = wave.continuations[index]
            tree.add_continuation(group_index, branch_index, wave.responses[number], rewards[number])
            tokens, count = tree.sampled_lengths[group_index]
            tree.sampled_lengths[group_index] = tokens + len(continuation.tokens), count + 1
            cost.tokens += len(continuation.tokens)
            cost.continuations += 1
            cost.unscored += math.isnan(rewards[number])
            cost.truncated += continuation.truncated
