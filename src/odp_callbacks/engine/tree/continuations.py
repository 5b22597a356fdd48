"""Targeted continuations: sampling responses from chosen branches and scoring them, to measure each branch's success.

One round runs in four steps: plan, sample, score, update the tree.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.journal import Journal, sample_unless_stored
from odp_callbacks.engine.rollouts import response_text
from odp_callbacks.engine.sampling.backends import PrefilledRollouts, sample_continuations
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, FinishedCallback
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes, ContinuationTree, Response
from odp_callbacks.engine.verifier import Scoring, Verifier

BranchIndex = tuple[int, int]
"""Index of a group in the tree, and of a branch in the group."""


@dataclass
class ContinuationCost:
    """What the continuations of a probe have cost so far.

    Attributes:
        tokens: Number of sampled tokens.
        continuations: Number of continuations.
        truncated: Number of continuations that the length limit cut.
        unscored: Number of continuations and endings that got no reward.
        verifier_seconds: Time spent waiting for the verifier after sampling.
    """

    tokens: int = 0
    continuations: int = 0
    truncated: int = 0
    unscored: int = 0
    verifier_seconds: float = 0.0


@dataclass
class ContinuationPlan:
    """What one round samples and scores.

    Attributes:
        ending_branches: Branches that end the response and have not been scored yet.
        requests: One request for each continuation to sample.
        branches: For each request, the branch that it starts with.
        keys: For each request, the key of its random draws.
    """

    ending_branches: list[BranchIndex] = field(default_factory=list)
    requests: list[ContinuationRequest] = field(default_factory=list)
    branches: list[BranchIndex] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ContinuationSampler:
    """Samples continuations from the branches of a tree and adds their rewards to it.

    Attributes:
        student: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        verifier: Scores the responses.
        prefilled: The rollouts' sequences, in the order of the tree's rollouts.
        tree: The tree that is sampled from and added to.
        config: The probe's configuration.
        eos_token_ids: Tokens that end a response.
        randomness: Random draws. Those of a continuation depend on its question, its prefix, its branch's token and
            its number among the branch's continuations.
        journal: Stores continuations as they finish; those that it holds already are not sampled again.
        cost: What has been sampled so far.
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

    def sample(self, allocation: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None) -> None:
        """Sample continuations, score them, and add their rewards to the tree.

        A branch that ends the response (with an end token, or with the last token that the limit allows) is scored
        once, and its success is then known exactly.

        Args:
            allocation: For each group and branch, the number of continuations to add.
            progress: Called with the number of finished continuations.
        """
        plan = self.plan(allocation)
        responses = _SubmittedResponses(self, plan, self.verifier.open(), progress)
        continuations = self._sample_planned(plan, responses)
        start = time.perf_counter()
        rewards = responses.scoring.rewards()
        self.cost.verifier_seconds += time.perf_counter() - start
        self._update(plan, responses, continuations, rewards)

    def plan(self, allocation: Sequence[Sequence[int]]) -> ContinuationPlan:
        """Turn an allocation into requests, and count them as started in the tree.

        Args:
            allocation: For each group and branch, the number of continuations to add.
        """
        tree, plan = self.tree, ContinuationPlan()
        for group_index, first_node in enumerate(tree.first_nodes):
            node = tree.nodes[first_node]
            prefix_length = len(tree.rollouts[node.rollout].question.prompt_ids) + node.depth
            max_new_tokens = self.config.max_new_tokens - node.depth - 1
            started_counts = tree.continuations_started[group_index]
            for branch_index, branch in enumerate(tree.branches[group_index]):
                if branch.token in self.eos_token_ids or max_new_tokens == 0:
                    if not tree.outcomes[group_index][branch_index].exact:
                        plan.ending_branches.append((group_index, branch_index))
                    continue
                for _ in range(allocation[group_index][branch_index]):
                    plan.requests.append(ContinuationRequest(node.rollout, prefix_length, branch.token, max_new_tokens))
                    plan.branches.append((group_index, branch_index))
                    plan.keys.append(
                        self.randomness.key(tree.draw_names[group_index], branch.token, started_counts[branch_index])
                    )
                    started_counts[branch_index] += 1
        return plan

    def _sample_planned(self, plan: ContinuationPlan, responses: "_SubmittedResponses") -> list[Continuation]:
        """Return the continuations of all requests, from the journal or sampled; each is submitted as it finishes."""

        def sample(missing: list[int], on_finished: FinishedCallback) -> list[Continuation]:
            return sample_continuations(
                self.student,
                self.prefilled,
                [plan.requests[request_index] for request_index in missing],
                temperature=self.config.temperature,
                eos_token_ids=self.eos_token_ids,
                keys=[plan.keys[request_index] for request_index in missing],
                batch_size=self.config.batch_size,
                max_memory_bytes=self.config.max_memory_bytes,
                on_finished=on_finished,
            )

        return sample_unless_stored(self.journal, plan.keys, sample, responses.submit)

    def _update(
        self,
        plan: ContinuationPlan,
        responses: "_SubmittedResponses",
        continuations: Sequence[Continuation],
        rewards: Mapping[int, float],
    ) -> None:
        """Add the rewards of a round to the tree, and its cost to the total."""
        tree = self.tree
        for number, (group_index, branch_index) in enumerate(plan.ending_branches):
            # This replaces the rewards of continuations that passed here: they sampled what is known exactly now.
            known = [] if math.isnan(rewards[number]) else [rewards[number]]
            tree.outcomes[group_index][branch_index] = BranchOutcomes(known, [0] * len(known), True)
        for number, ((group_index, branch_index), continuation) in enumerate(
            zip(plan.branches, continuations, strict=True), len(plan.ending_branches)
        ):
            tree.add_continuation(group_index, branch_index, responses.by_number[number], rewards[number])
            tokens, count = tree.sampled_lengths[group_index]
            tree.sampled_lengths[group_index] = tokens + len(continuation.tokens), count + 1
        self.cost.tokens += sum(len(continuation.tokens) for continuation in continuations)
        self.cost.continuations += len(continuations)
        self.cost.unscored += sum(math.isnan(reward) for reward in rewards.values())
        self.cost.truncated += sum(continuation.truncated for continuation in continuations)


class _SubmittedResponses:
    """The responses of one round that the verifier has received.

    Attributes:
        scoring: The verifier's side.
        by_number: The responses by their numbers: first the ending branches, then the requests, in the plan's order.
    """

    def __init__(
        self,
        sampler: ContinuationSampler,
        plan: ContinuationPlan,
        scoring: Scoring,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.scoring = scoring
        self.by_number: dict[int, Response] = {}
        self._sampler, self._plan, self._progress = sampler, plan, progress
        self._finished_count = 0
        for number, branch in enumerate(plan.ending_branches):
            self._submit_response(number, branch, ())

    def submit(self, continuations: Mapping[int, Continuation]) -> None:
        """Submit finished continuations, by the index of their request."""
        for request_index, continuation in continuations.items():
            self._submit_response(
                len(self._plan.ending_branches) + request_index,
                self._plan.branches[request_index],
                continuation.tokens,
            )
        self._finished_count += len(continuations)
        if self._progress is not None:
            self._progress(self._finished_count)

    def _submit_response(self, number: int, branch: BranchIndex, suffix: Response) -> None:
        tree, (group_index, branch_index) = self._sampler.tree, branch
        node_index = tree.first_nodes[group_index]
        response = (*tree.prefix(node_index), tree.branches[group_index][branch_index].token, *suffix)
        self.by_number[number] = response
        question = tree.rollouts[tree.nodes[node_index].rollout].question
        text = response_text(self._sampler.tokenizer, response, self._sampler.eos_token_ids)
        self.scoring.add(number, question, text, response)
