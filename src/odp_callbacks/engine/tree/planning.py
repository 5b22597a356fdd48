"""The measured nodes of a probe and their branches, before anything is known about their success."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.tree.branches import Branch, choose_branches
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.nodes import Node, group_by_question, systematic_sample

EXPLORATION_SHARE = 0.5
"""Share of the budget that one continuation of every branch may take; if it would take more, nodes are subsampled."""


@dataclass(frozen=True)
class MeasuredNodes:
    """The nodes that a probe measures.

    Attributes:
        nodes: ``N`` nodes.
        branches: ``N`` lists of branches.
        student_logits: ``N`` tensors ``(V,)``, the student's logits.
        tree: The prefixes that continuations start from.
    """

    nodes: list[Node]
    branches: list[list[Branch]]
    student_logits: list[Tensor]
    tree: ContinuationTree


def plan_branches(
    student: nn.Module,
    rollouts: Sequence[Rollout],
    nodes: list[Node],
    config: ProbeConfig,
    *,
    eos_token_ids: Sequence[int],
    token_budget: float,
    randomness: Randomness,
) -> MeasuredNodes:
    """Choose the branches of every prefix, and subsample the nodes if the budget is too small for all of them.

    Args:
        student: The student, in evaluation mode.
        rollouts: The probe's rollouts.
        nodes: The nodes to measure.
        config: The probe's configuration.
        eos_token_ids: Tokens that end a response.
        token_budget: Expected number of tokens that continuations may take; infinite where there is no budget.
        randomness: Random draws, by the prefix's name.
    """
    student_logits = node_student_logits(student, rollouts, nodes)
    tree = ContinuationTree(rollouts, nodes)
    branches = [
        choose_branches(
            torch.softmax(student_logits[first_node].double() / config.temperature, dim=-1),
            tree.taken_tokens(group_index),
            mass=config.branch_mass,
            max_branches=config.max_branches,
            tail_draws=config.tail_draws,
            generator=randomness.generator(*tree.draw_names[group_index], "branches"),
        )
        for group_index, first_node in enumerate(tree.first_nodes)
    ]
    if config.adaptive:
        costs = [
            remaining_length(rollouts, nodes[first_node].depth, standard_errors=1.0)
            * sum(branch.token not in eos_token_ids for branch in group_branches)
            for first_node, group_branches in zip(tree.first_nodes, branches, strict=True)
        ]
        kept_nodes = subsample_nodes(nodes, tree, costs, EXPLORATION_SHARE * token_budget, randomness.generator("thin"))
        if len(kept_nodes) < len(nodes):
            node_indices = {(node.rollout, node.depth): node_index for node_index, node in enumerate(nodes)}
            kept_groups = [tree.group_of_node[node_indices[node.rollout, node.depth]] for node in kept_nodes]
            branches = [branches[group_index] for group_index in dict.fromkeys(kept_groups)]
            # The logits are computed again, in the same batches as the teachers' will be: a teacher that equals the
            # student must give the same bits.
            nodes, student_logits = kept_nodes, node_student_logits(student, rollouts, kept_nodes)
            tree = ContinuationTree(rollouts, nodes)
    tree.set_branches(branches)
    return MeasuredNodes(nodes, [tree.branches[group] for group in tree.group_of_node], student_logits, tree)


def subsample_nodes(
    nodes: Sequence[Node], tree: ContinuationTree, costs: Sequence[float], budget: float, generator: torch.Generator
) -> list[Node]:
    """Draw a subset of the nodes if one continuation of every branch would take too much of the budget.

    A prefix is kept with a probability in proportion to the mean weight of its nodes: those that are kept then weigh
    nearly alike. Systematic sampling spreads them over questions, rollouts and depths.

    Args:
        nodes: All nodes.
        tree: Their prefixes. Nodes with the same prefix are kept or dropped together.
        costs: ``G`` numbers: expected number of tokens of one continuation of every branch of a prefix.
        budget: The tokens that these continuations may take.
        generator: Random stream of the draw.

    Returns:
        The nodes that are kept, with their inclusion probabilities reduced accordingly.
    """
    if sum(costs) <= budget:
        return list(nodes)
    weights = torch.zeros(len(costs), dtype=torch.float64)
    members = torch.zeros(len(costs), dtype=torch.float64)
    for node, group_index in zip(nodes, tree.group_of_node, strict=True):
        weights[group_index] += 1 / node.inclusion
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


def node_student_logits(student: nn.Module, rollouts: Sequence[Rollout], nodes: Sequence[Node]) -> list[Tensor]:
    """Compute the student's logits ``(V,)`` at each node, question by question, in the batches used for the teachers.

    Args:
        student: The student, in evaluation mode.
        rollouts: The probe's rollouts.
        nodes: The nodes; those of one rollout stand together.
    """
    node_logits: list[Tensor] = []
    for rollout_indices, depths in group_by_question(rollouts, nodes):
        prompts = [rollouts[index].question.prompt_ids for index in rollout_indices]
        responses = [rollouts[index].response_ids for index in rollout_indices]
        for logits in response_logits(student, prompts, responses, depths):
            node_logits += list(logits)
    return node_logits
