"""The prefixes of a probe, and the rewards that have been observed behind each of their branches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.nodes import Node

Response = tuple[int, ...]
"""Tokens of a response, or of its beginning."""


@dataclass
class BranchOutcomes:
    """The rewards observed behind one branch.

    Attributes:
        rewards: One number in [0, 1] for each continuation.
        halves: For each reward, which of two disjoint halves (0 or 1) it belongs to. A continuation that counts at
            several nodes belongs to the same half at all of them.
        exact: Whether the branch ends the response, so that its one reward is its success.
    """

    rewards: list[float] = field(default_factory=list)
    halves: list[int] = field(default_factory=list)
    exact: bool = False

    def add(self, reward: float, half: int) -> None:
        """Add the reward of one continuation."""
        self.rewards.append(reward)
        self.halves.append(half)


class ContinuationTree:
    """The prefixes of a probe's nodes, their branches, and the outcomes of the branches.

    Nodes of one question that have the same prefix form a group and share their continuations. A continuation that
    passes through another node of its question is also a sample of the branch that it takes there. So is a sibling
    rollout. A rollout's own ending is not a sample at its own nodes: figures are split by whether the rollout was
    correct, and in the incorrect class the ending would always be a failure.

    Args:
        rollouts: The probe's rollouts.
        nodes: The probe's ``N`` nodes, which lie in ``G`` groups.

    Attributes:
        group_of_node: ``N`` group indices, one for each node.
        first_nodes: ``G`` node indices, the first node of each group.
        draw_names: ``G`` pairs of question id and prefix, which name the random draws of each group.
        branches: The branches of each group; empty until :meth:`set_branches`.
        outcomes: The outcomes of each group's branches.
        continuations_started: For each group and branch, the number of continuations started there.
        sampled_lengths: For each group, the number of tokens and of continuations sampled there.
    """

    def __init__(self, rollouts: Sequence[Rollout], nodes: Sequence[Node]) -> None:
        self.rollouts, self.nodes = rollouts, nodes
        # Questions are told apart by identity: two rows may be equal.
        self._group_of_prefix: dict[tuple[int, Response], int] = {}
        self.group_of_node: list[int] = []
        self.first_nodes: list[int] = []
        self.draw_names: list[tuple[str, Response]] = []
        for node_index, node in enumerate(nodes):
            question, prefix = rollouts[node.rollout].question, self.prefix(node_index)
            if (id(question), prefix) not in self._group_of_prefix:
                self._group_of_prefix[id(question), prefix] = len(self.first_nodes)
                self.first_nodes.append(node_index)
                self.draw_names.append((question.id, prefix))
            self.group_of_node.append(self._group_of_prefix[id(question), prefix])
        self._taken_tokens: list[list[int]] = [[] for _ in self.first_nodes]
        for node, group_index in zip(nodes, self.group_of_node, strict=True):
            self._taken_tokens[group_index].append(rollouts[node.rollout].response_ids[node.depth])
        self._node_depths: dict[int, set[int]] = {}
        for question_key, prefix in self._group_of_prefix:
            self._node_depths.setdefault(question_key, set()).add(len(prefix))
        self._siblings: dict[int, list[int]] = {}
        for rollout_index, rollout in enumerate(rollouts):
            self._siblings.setdefault(id(rollout.question), []).append(rollout_index)
        self.branches: list[list[Branch]] = []
        self.outcomes: list[list[BranchOutcomes]] = []
        self.continuations_started: list[list[int]] = []
        self.sampled_lengths: list[tuple[int, int]] = []

    def prefix(self, node_index: int) -> Response:
        """Return the response tokens before a node."""
        node = self.nodes[node_index]
        return self.rollouts[node.rollout].response_ids[: node.depth]

    def taken_tokens(self, group_index: int) -> list[int]:
        """Return the tokens that the rollouts took at the nodes of a group, in the order of the nodes."""
        return self._taken_tokens[group_index]

    def set_branches(self, branches: Sequence[list[Branch]]) -> None:
        """Set the branches of each group, without any outcome yet."""
        self.branches = list(branches)
        self.outcomes = [[BranchOutcomes() for _ in group_branches] for group_branches in branches]
        self.sampled_lengths = [(0, 0)] * len(self.branches)
        self.continuations_started = [[0] * len(group_branches) for group_branches in branches]

    def add_continuation(self, group_index: int, branch_index: int, response: Response, reward: float) -> None:
        """Add a finished continuation to its branch, and to every branch that it takes at a later node.

        Args:
            group_index: The group where the continuation started.
            branch_index: The branch that it started with.
            response: The whole response, from its first token.
            reward: The verifier's reward; a continuation with NaN, which has none, is left out.
        """
        if math.isnan(reward):
            return
        outcome = self.outcomes[group_index][branch_index]
        half = len(outcome.rewards) % 2
        outcome.add(reward, half)
        first_node = self.nodes[self.first_nodes[group_index]]
        question_key = id(self.rollouts[first_node.rollout].question)
        for depth in self._node_depths[question_key]:
            if first_node.depth < depth < len(response):
                passed_group = self._group_of_prefix.get((question_key, response[:depth]))
                if passed_group is not None:
                    _add_to_branch(
                        self.outcomes[passed_group], self.branches[passed_group], response[depth], reward, half
                    )

    def node_outcomes(self, node_index: int) -> list[BranchOutcomes]:
        """Return the outcomes of a node's branches, with those of the sibling rollouts that pass through the node."""
        group, node = self.group_of_node[node_index], self.nodes[node_index]
        outcomes = [
            BranchOutcomes(list(outcome.rewards), list(outcome.halves), outcome.exact)
            for outcome in self.outcomes[group]
        ]
        prefix = self.prefix(node_index)
        for sibling in self._siblings[id(self.rollouts[node.rollout].question)]:
            response = self.rollouts[sibling].response_ids
            if sibling != node.rollout and len(response) > node.depth and response[: node.depth] == prefix:
                _add_to_branch(
                    outcomes, self.branches[group], response[node.depth], self.rollouts[sibling].reward, sibling % 2
                )
        return outcomes


def _add_to_branch(
    outcomes: Sequence[BranchOutcomes], branches: Sequence[Branch], token: int, reward: float, half: int
) -> None:
    """Add a reward to the branch with this token, if there is one and its success is not known exactly."""
    for outcome, branch in zip(outcomes, branches, strict=True):
        if branch.token == token and not outcome.exact:
            outcome.add(reward, half)
