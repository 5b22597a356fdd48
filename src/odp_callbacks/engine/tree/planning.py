"""The measured nodes of a probe and their branches, before anything is known about their success."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.node_logits import NodeLogits
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.tree.branches import Branch, choose_branches, proposed_tokens
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.nodes import Node, systematic_sample

EXPLORATION_SHARE = 0.5
"""Share of the budget that one continuation of every branch may take; if it would take more, nodes are subsampled."""
CANDIDATES = 2.0
"""How many times as much the candidates may take, whose teachers' logits tell which ones are kept."""


@dataclass(frozen=True)
class MeasuredNodes:
    """The nodes that a probe measures.

    Attributes:
        nodes: ``N`` nodes.
        logits: The student's and the teachers' logits at the nodes.
        branches: ``N`` lists of branches.
        tree: The prefixes that continuations start from.
    """

    nodes: list[Node]
    logits: NodeLogits
    branches: list[list[Branch]]
    tree: ContinuationTree


class TimeInTokens(Protocol):
    """Time, in tokens that could be sampled in it."""

    def affordable_tokens(self) -> float:
        """The time that is left."""

    def gradient_tokens(self, nodes: Sequence[tuple[Rollout, int, int]]) -> list[float]:
        """What the gradients of each node take, given as rollout, depth and number of branches."""


def thin_nodes(
    rollouts: Sequence[Rollout],
    logits: NodeLogits,
    config: ProbeConfig,
    *,
    eos_token_ids: Sequence[int],
    token_budget: float,
    generator: torch.Generator,
    randomness: Randomness,
    time: TimeInTokens | None = None,
    share: float = EXPLORATION_SHARE,
    proposals: Sequence[Sequence[int]] | None = None,
    factors: Tensor | None = None,
) -> list[Node]:
    """Subsample the nodes if the budget or the time is too small for all of them.

    Args:
        rollouts: The probe's rollouts.
        logits: The student's logits at ``N`` nodes; the teachers' are not used.
        config: The probe's configuration.
        eos_token_ids: Tokens that end a response.
        token_budget: Expected number of tokens that continuations may take; infinite where there is no budget.
        generator: Random stream of the draw, on the CPU.
        randomness: Random draws of branches, by the prefix's name.
        time: What continuations and gradients may take together; None for no limit.
        share: Share of the budget or time that one continuation of every branch may take.
        proposals: For each node, the tokens that teachers propose there, as far as they are known.
        factors: ``(N,)``, by which the probability of keeping a node is multiplied; None for 1.

    Returns:
        The nodes that are kept, with their inclusion probabilities reduced accordingly.
    """
    nodes = logits.nodes
    is_limited = config.adaptive or (time is not None and not math.isinf(time.affordable_tokens()))
    if not is_limited or not nodes:
        return nodes
    tree = ContinuationTree(rollouts, nodes)
    branches = branches_of_groups(tree, logits, config, randomness, proposals or [()] * len(nodes))
    costs = [
        remaining_length(rollouts, nodes[first_node].depth, standard_errors=1.0)
        * sum(branch.token not in eos_token_ids for branch in group_branches)
        for first_node, group_branches in zip(tree.first_nodes, branches, strict=True)
    ]
    budget = share * token_budget
    if time is not None:
        members = [0.0] * len(costs)
        of_nodes = time.gradient_tokens(
            [
                (rollouts[node.rollout], node.depth, len(branches[group]))
                for node, group in zip(nodes, tree.group_of_node, strict=True)
            ]
        )
        for tokens, group in zip(of_nodes, tree.group_of_node, strict=True):
            members[group] += tokens
        count = 1 if config.adaptive else config.continuations
        # A wave that may not end in time counts nowhere, so there must be time for the longest continuations.
        with_gradients = [
            gradients + count * len(of_group) * max(1, config.max_new_tokens - nodes[first_node].depth - 1)
            for gradients, first_node, of_group in zip(members, tree.first_nodes, branches, strict=True)
        ]
        affordable = share * time.affordable_tokens()
        if sum(with_gradients) * budget > sum(costs) * affordable:  # time is the tighter limit
            costs, budget = with_gradients, affordable
    return subsample_nodes(nodes, tree, costs, budget, generator, factors)


def plan_branches(
    rollouts: Sequence[Rollout],
    logits: NodeLogits,
    proposals: Sequence[Sequence[int]],
    config: ProbeConfig,
    randomness: Randomness,
) -> MeasuredNodes:
    """Choose the branches of every prefix.

    Args:
        rollouts: The probe's rollouts.
        logits: The student's and the teachers' logits at the nodes to measure.
        proposals: For each node, the tokens that teachers propose there.
        config: The probe's configuration.
        randomness: Random draws, by the prefix's name.
    """
    tree = ContinuationTree(rollouts, logits.nodes)
    tree.set_branches(branches_of_groups(tree, logits, config, randomness, proposals))
    return MeasuredNodes(logits.nodes, logits, [tree.branches[group] for group in tree.group_of_node], tree)


def branches_of_groups(
    tree: ContinuationTree,
    logits: NodeLogits,
    config: ProbeConfig,
    randomness: Randomness,
    proposals: Sequence[Sequence[int]],
) -> list[list[Branch]]:
    """Choose the branches of each prefix of a tree: likely tokens, taken ones, those that teachers propose, the tail.

    Args:
        tree: The prefixes, ``G`` of them.
        logits: The student's logits at the tree's nodes.
        config: The probe's configuration.
        randomness: Random draws, by the prefix's name.
        proposals: For each node, the tokens that teachers propose there.

    Returns:
        ``G`` lists of branches.
    """
    return [
        choose_branches(
            torch.softmax(logits.student_logits[first_node].double() / config.temperature, dim=-1),
            [*tree.taken_tokens(group_index), *proposals[first_node]],
            mass=config.branch_mass,
            max_branches=config.max_branches,
            tail_draws=config.tail_draws,
            tail_roulette=config.tail_roulette,
            generator=randomness.generator(*tree.draw_names[group_index], "branches"),
        )
        for group_index, first_node in enumerate(tree.first_nodes)
    ]


def proposals_of_teachers(logits: NodeLogits, config: ProbeConfig) -> list[list[int]]:
    """The tokens that teachers propose at each node."""
    proposals: list[list[int]] = [[] for _ in logits.student_logits]
    threshold = config.teacher_branch_probability
    if threshold is None or not logits.teachers:
        return proposals
    for number in range(len(logits.questions)):
        for of_rollout in logits.of_question(number):
            for place, node_index in enumerate(of_rollout.node_indices):
                policies = [
                    torch.softmax(teacher[place] / config.temperature, dim=-1) for teacher in of_rollout.teachers
                ]
                proposals[node_index] = proposed_tokens(policies, threshold, config.max_branches)
    return proposals


def subsample_nodes(
    nodes: Sequence[Node],
    tree: ContinuationTree,
    costs: Sequence[float],
    budget: float,
    generator: torch.Generator,
    factors: Tensor | None = None,
) -> list[Node]:
    """Draw a subset of the nodes if one continuation of every branch would take too much of the budget.

    A prefix is kept with a probability in proportion to the mean weight of its nodes, times their factors: without
    factors, those that are kept weigh nearly alike. Systematic sampling spreads them over questions, rollouts and
    depths.

    Args:
        nodes: All nodes.
        tree: Their prefixes. Nodes with the same prefix are kept or dropped together.
        costs: ``G`` numbers: expected number of tokens of one continuation of every branch of a prefix.
        budget: The tokens that these continuations may take.
        generator: Random stream of the draw.
        factors: ``(N,)`` float64, positive; None for 1.

    Returns:
        The nodes that are kept, with their inclusion probabilities reduced accordingly.
    """
    if sum(costs) <= budget:
        return list(nodes)
    weights = torch.zeros(len(costs), dtype=torch.float64)
    members = torch.zeros(len(costs), dtype=torch.float64)
    for index, (node, group_index) in enumerate(zip(nodes, tree.group_of_node, strict=True)):
        weights[group_index] += (1.0 if factors is None else float(factors[index])) / node.inclusion
        members[group_index] += 1
    keeping = keeping_probabilities(weights / members, torch.tensor(costs, dtype=torch.float64), budget)
    kept = dict(systematic_sample(keeping, generator))
    return [
        replace(node, inclusion=node.inclusion * kept[group_index])
        for node, group_index in zip(nodes, tree.group_of_node, strict=True)
        if group_index in kept
    ]


def keeping_probabilities(weights: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Compute probabilities proportional to ``weights``, none above 1, whose expected cost is the budget.

    Args:
        weights: ``(G,)``, positive.
        costs: ``(G,)``, not negative.
        budget: The expected cost; the probabilities add up to at least 1 also where it is smaller.

    Examples:
        >>> keeping_probabilities(torch.tensor([4.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0]), 2.0)
        tensor([1.0000, 0.5000, 0.5000])
    """
    order = torch.argsort(weights, descending=True)
    sorted_weights, sorted_costs = weights[order], costs[order]
    # With the first n groups certain, the scale of the others; the first n at which no other exceeds 1 is right.
    certain_cost = sorted_costs.cumsum(0) - sorted_costs
    other_cost = (sorted_weights * sorted_costs).flip(0).cumsum(0).flip(0)
    scales = (budget - certain_cost) / other_cost.clamp(min=torch.finfo(weights.dtype).tiny)
    fits = (scales * sorted_weights <= 1).nonzero()
    scale = scales[fits[0, 0]] if len(fits) else 1 / sorted_weights[-1]
    probabilities = (scale * weights).clamp(0, 1)
    if (total := probabilities.sum()) < 1:  # something has to be measured
        shares = weights / weights.sum() if total == 0 else probabilities / total
        probabilities = shares.clamp(max=1)
    return probabilities


def remaining_length(rollouts: Sequence[Rollout], depth: int, standard_errors: float = 0.0) -> float:
    """Estimate from the rollouts how many tokens a continuation from ``depth`` takes after its first, at least 1.

    Args:
        rollouts: The probe's rollouts.
        depth: Depth of the prefix.
        standard_errors: Standard errors that are added to the mean: what is spent cannot be taken back.
    """
    lengths = [len(rollout.response_ids) - depth - 1 for rollout in rollouts if len(rollout.response_ids) > depth]
    mean = float(np.mean(lengths)) if lengths else 1.0
    if standard_errors and len(lengths) > 1:
        mean += standard_errors * float(np.std(lengths, ddof=1)) / len(lengths) ** 0.5
    return max(1.0, mean)
