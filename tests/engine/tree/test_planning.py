"""Which nodes a small budget keeps."""

import numpy as np
import pytest
import torch

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.nodes import Node, exponential_windows
from odp_callbacks.engine.tree.planning import keeping_probabilities, subsample_nodes


def long_nodes(generator: torch.Generator) -> tuple[list[Node], ContinuationTree]:
    """Nodes in windows of 24 different rollouts of 512 tokens."""
    rollouts = [
        Rollout(Question(str(index), {}, torch.tensor([1])), tuple([index] * 512), "", False) for index in range(24)
    ]
    nodes = [
        Node(index, depth, inclusion)
        for index, rollout in enumerate(rollouts)
        for depth, inclusion in exponential_windows(rollout, generator)
    ]
    return nodes, ContinuationTree(rollouts, nodes)


def kish_share(nodes: list[Node]) -> float:
    weights = np.array([1 / node.inclusion for node in nodes])
    return float(weights.sum() ** 2 / len(weights) / (weights**2).sum())


def test_a_small_budget_evens_the_weights_of_windows(generator: torch.Generator) -> None:
    nodes, tree = long_nodes(generator)
    costs = [float(512 - node.depth) for node in nodes]
    kept = subsample_nodes(nodes, tree, costs, sum(costs) / 10, generator)
    assert kish_share(nodes) < 0.35
    assert kish_share(kept) > 0.8


def test_thinned_sums_are_unbiased(generator: torch.Generator) -> None:
    nodes, tree = long_nodes(generator)
    costs = [float(512 - node.depth) for node in nodes]
    full = sum(np.log1p(node.depth) / node.inclusion for node in nodes)
    sums, spent = [], []
    for _ in range(2000):
        kept = subsample_nodes(nodes, tree, costs, sum(costs) / 5, generator)
        sums.append(sum(np.log1p(node.depth) / node.inclusion for node in kept))
        spent.append(sum(512 - node.depth for node in kept))
    assert abs(np.mean(sums) - full) < 3.5 * np.std(sums) / np.sqrt(len(sums))
    assert np.mean(spent) == pytest.approx(sum(costs) / 5, rel=0.02)


def test_sums_thinned_by_factors_are_unbiased_and_follow_the_factors(generator: torch.Generator) -> None:
    nodes, tree = long_nodes(generator)
    factors = 0.6 + 0.4 * torch.tensor([4.0 if node.depth % 4 == 0 else 0.0 for node in nodes], dtype=torch.float64)
    values = [(-1.0) ** node.rollout * (1 + node.depth % 4 == 1) + 0.1 for node in nodes]
    costs = [1.0] * len(nodes)
    full = sum(value / node.inclusion for node, value in zip(nodes, values, strict=True))
    value_of = {(node.rollout, node.depth): value for node, value in zip(nodes, values, strict=True)}
    sums, counts = [], []
    for _ in range(2000):
        kept = subsample_nodes(nodes, tree, costs, len(nodes) / 50, generator, factors)
        sums.append(sum(value_of[node.rollout, node.depth] / node.inclusion for node in kept))
        counts.append(len(kept))
        scales = [node.inclusion / (2.2 if node.depth % 4 == 0 else 0.6) for node in kept]
        assert max(scales) == pytest.approx(min(scales))
    assert abs(np.mean(sums) - full) < 3.5 * np.std(sums) / np.sqrt(len(sums))
    assert np.mean(counts) == pytest.approx(len(nodes) / 50, rel=0.02)


def test_all_nodes_are_kept_where_the_budget_allows_it(generator: torch.Generator) -> None:
    nodes, tree = long_nodes(generator)
    assert subsample_nodes(nodes, tree, [1.0] * len(nodes), len(nodes), generator) == nodes


@pytest.mark.parametrize("budget", [0.0, 1e-9, 1.0, 7.5, 100.0])
def test_probabilities_are_in_proportion_up_to_1_and_cost_the_budget(budget: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(40, generator=generator, dtype=torch.float64) ** 3 + 1e-3
    costs = torch.rand(40, generator=generator, dtype=torch.float64) * 10
    probabilities = keeping_probabilities(weights, costs, budget)
    assert float(probabilities.max()) <= 1
    assert float(probabilities.sum()) >= 1 - 1e-9
    below_one = probabilities < 1
    ratios = probabilities[below_one] / weights[below_one]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    if float(probabilities.sum()) > 1 + 1e-9:
        assert float((probabilities * costs).sum()) == pytest.approx(budget)


def test_something_is_kept_of_one_expensive_prefix(generator: torch.Generator) -> None:
    rollout = Rollout(Question("0", {}, torch.tensor([1])), (1, 2), "", False)
    nodes = [Node(0, 0, 1.0)]
    assert subsample_nodes(nodes, ContinuationTree([rollout], nodes), [1000.0], 1.0, generator) == nodes
