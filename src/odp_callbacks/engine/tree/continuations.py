"""Targeted rollouts: how often the student succeeds from each branch, measured by its own continuations.

What is known already is not sampled again. Nodes with the same prefix share their continuations; a continuation that
passes through another node of its question is a sample of the branch that it takes there; and so is a sibling rollout.
A rollout's own ending is none: figures are split by whether it was correct, and in the incorrect class it would be a
failure every time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from odp_callbacks.engine.rollouts import Rollout, response_text
from odp_callbacks.engine.sampling.backends import PrefilledRollouts, sample_continuations
from odp_callbacks.engine.sampling.categorical import Continuation
from odp_callbacks.engine.sampling.prefix_cache import ContinuationRequest
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.journal import Journal
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.engine.verifier import Verifier

Response = tuple[int, ...]


@dataclass
class BranchOutcomes:
    """What was seen of one branch.

    Attributes:
        rewards: One number in [0, 1] for each continuation.
        halves: Which of two disjoint halves each belongs to: what is seen at several nodes is in the same half of all.
        exact: The branch ends the response, so its one reward is its success.
    """

    rewards: list[float] = field(default_factory=list)
    halves: list[int] = field(default_factory=list)
    exact: bool = False

    def add(self, reward: float, half: int) -> None:
        """Add a reward."""
        self.rewards.append(reward)
        self.halves.append(half)


@dataclass
class ContinuationCost:
    """What continuations cost: tokens, how many there were, how many the limit cut, seconds spent on the verifier."""

    tokens: int = 0
    continuations: int = 0
    truncated: int = 0
    waited: float = 0.0


class ContinuationTree:
    """The prefixes of a probe and what was seen of their branches.

    Args:
        rollouts: The probe's rollouts.
        nodes: Its nodes.

    Attributes:
        group: For each node, which prefix it has; nodes of one question with the same prefix are one group.
        first: For each group, its first node.
        names: For each group, what names its random draws: the question's id and the prefix.
        asked: For each group and branch, how many continuations were started there.
    """

    def __init__(self, rollouts: Sequence[Rollout], nodes: Sequence[Node]) -> None:
        self.rollouts, self.nodes = rollouts, nodes
        self._place: dict[tuple[int, Response], int] = {}
        self.group: list[int] = []
        self.first: list[int] = []
        self.names: list[tuple[str, Response]] = []
        for n, node in enumerate(nodes):
            key = id(rollouts[node.rollout].question), self.prefix(n)
            if key not in self._place:
                self._place[key] = len(self.first)
                self.first.append(n)
                self.names.append((rollouts[node.rollout].question.id, self.prefix(n)))
            self.group.append(self._place[key])
        self._depths: dict[int, set[int]] = {}
        for question, prefix in self._place:
            self._depths.setdefault(question, set()).add(len(prefix))
        self._siblings: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            self._siblings.setdefault(id(rollout.question), []).append(i)
        self._taken: list[list[int]] = [[] for _ in self.first]
        for n, g in enumerate(self.group):
            self._taken[g].append(rollouts[nodes[n].rollout].response_ids[nodes[n].depth])
        self.branches: list[list[Branch]] = []
        self.outcomes: list[list[BranchOutcomes]] = []
        self.asked: list[list[int]] = []
        self.length: list[tuple[int, int]] = []

    def prefix(self, node: int) -> Response:
        """Response tokens before a node."""
        where = self.nodes[node]
        return self.rollouts[where.rollout].response_ids[: where.depth]

    def taken(self, group: int) -> list[int]:
        """Tokens that the rollouts took at a prefix where they are measured."""
        return self._taken[group]

    def extend_prefix_cache(self, branches: Sequence[list[Branch]]) -> None:
        """Give each group its branches."""
        self.branches = list(branches)
        self.outcomes = [[BranchOutcomes() for _ in row] for row in branches]
        self.length = [(0, 0)] * len(self.branches)
        self.asked = [[0] * len(row) for row in branches]

    def add(self, group: int, branch: int, response: Response, reward: float) -> None:
        """Add a finished continuation to its branch, and to every branch that it passed on its way."""
        own = self.outcomes[group][branch]
        half = len(own.rewards) % 2
        own.add(reward, half)
        question = id(self.rollouts[self.nodes[self.first[group]].rollout].question)
        depth = self.nodes[self.first[group]].depth
        for later in self._depths[question]:
            if depth < later < len(response):
                passed = self._place.get((question, response[:later]))
                if passed is not None:
                    self._see(self.outcomes[passed], self.branches[passed], response[later], reward, half)

    @staticmethod
    def _see(
        outcomes: Sequence[BranchOutcomes], branches: Sequence[Branch], token: int, reward: float, half: int
    ) -> None:
        for outcome, branch in zip(outcomes, branches, strict=True):
            if branch.token == token and not outcome.exact:
                outcome.add(reward, half)

    def at(self, node: int) -> list[BranchOutcomes]:
        """What is known of a node's branches: continuations, and the sibling rollouts that pass through it."""
        group, where = self.group[node], self.nodes[node]
        found = [BranchOutcomes(list(o.rewards), list(o.halves), o.exact) for o in self.outcomes[group]]
        prefix = self.prefix(node)
        for i in self._siblings[id(self.rollouts[where.rollout].question)]:
            path = self.rollouts[i].response_ids
            if i != where.rollout and len(path) > where.depth and path[: where.depth] == prefix:
                self._see(found, self.branches[group], path[where.depth], self.rollouts[i].reward, i % 2)
        return found


def measure_success(
    model: nn.Module,
    tokenizer: Any,
    verifier: Verifier,
    prefixes: PrefilledRollouts,
    tree: ContinuationTree,
    *,
    allocation: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    randomness: Randomness,
    batch_size: int,
    memory: float | None = None,
    spent: ContinuationCost,
    progress: Callable[[int], None] | None = None,
    journal: Journal | None = None,
) -> None:
    """Sample continuations from branches, score them, and add their rewards to the tree.

    A branch that ends the response (an end token, or the last one the limit allows) is scored once and known exactly.

    Args:
        model: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        verifier: Scores what has finished.
        prefixes: The rollouts' sequences, in their order.
        tree: Where to branch; added to.
        allocation: For each group and branch, how many continuations to add.
        max_new_tokens: Limit of the whole response.
        temperature: Sampling temperature.
        eos_token_ids: Tokens that end a response.
        randomness: A continuation's draws depend on its question, its prefix and its place among its branch's own.
        batch_size: The most continuations at a time.
        memory: The most bytes that they may take; None for half of what is free.
        spent: Added to.
        progress: Called with the number of finished continuations.
        journal: Keeps continuations as they finish; those that it has already are not sampled.
    """
    starts: list[ContinuationRequest] = []
    owners: list[tuple[int, int]] = []
    keys: list[int] = []
    finished: list[tuple[int, int]] = []
    for g, first in enumerate(tree.first):
        node = tree.nodes[first]
        prompt = len(tree.rollouts[node.rollout].question.prompt_ids)
        for b, branch in enumerate(tree.branches[g]):
            left = max_new_tokens - node.depth - 1
            if branch.token in eos_token_ids or left == 0:
                if not tree.outcomes[g][b].exact:
                    finished.append((g, b))
                continue
            starts += [ContinuationRequest(node.rollout, prompt + node.depth, branch.token, left)] * allocation[g][b]
            owners += [(g, b)] * allocation[g][b]
            for _ in range(allocation[g][b]):
                keys.append(randomness.key(tree.names[g], branch.token, tree.asked[g][b]))
                tree.asked[g][b] += 1
    scoring = verifier.open()

    responses: dict[int, Response] = {}

    def hand_in(place: int, owner: tuple[int, int], tail: Response) -> None:
        g, b = owner
        responses[place] = response = (*tree.prefix(tree.first[g]), tree.branches[g][b].token, *tail)
        question = tree.rollouts[tree.nodes[tree.first[g]].rollout].question
        scoring.add(place, question, response_text(tokenizer, response, eos_token_ids), response)

    for place, owner in enumerate(finished):
        hand_in(place, owner, ())
    done = 0

    def take(some: dict[int, Continuation]) -> None:
        nonlocal done
        for i, continuation in some.items():
            hand_in(len(finished) + i, owners[i], continuation.tokens)
        done += len(some)
        if progress is not None:
            progress(done)

    found = {i: journal.known[key] for i, key in enumerate(keys) if key in journal.known} if journal else {}
    take(found)
    missing = [i for i in range(len(starts)) if i not in found]

    def keep(some: dict[int, Continuation]) -> None:
        own = {missing[j]: continuation for j, continuation in some.items()}
        if journal is not None:
            for i, continuation in own.items():
                journal.put(keys[i], continuation)
            journal.flush()
        take(own)

    drawn = sample_continuations(
        model,
        prefixes,
        [starts[i] for i in missing],
        temperature=temperature,
        eos_token_ids=eos_token_ids,
        keys=[keys[i] for i in missing],
        batch_size=batch_size,
        memory=memory,
        finished=keep,
    )
    found.update(zip(missing, drawn, strict=True))
    sampled = [found[i] for i in range(len(starts))]
    start = time.perf_counter()
    rewards = scoring.rewards()
    spent.waited += time.perf_counter() - start
    for place, (g, b) in enumerate(finished):
        # What passed here was a sample of the same reward; now it is known.
        tree.outcomes[g][b] = BranchOutcomes([rewards[place]], [0], True)
    for place, ((g, b), continuation) in enumerate(zip(owners, sampled, strict=True), len(finished)):
        tree.add(g, b, responses[place], rewards[place])
        tokens, count = tree.length[g]
        tree.length[g] = tokens + len(continuation.tokens), count + 1
    spent.tokens += sum(len(c.tokens) for c in sampled)
    spent.continuations += len(sampled)
    spent.truncated += sum(c.truncated for c in sampled)
