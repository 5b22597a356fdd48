import numpy as np
import pytest
import torch
from scipy import stats

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.tree.nodes import BalancedNodes, every_node, exponential_windows, select_nodes


def rollout(length):
    return Rollout(Question("0", {}, torch.tensor([1])), tuple(range(length)), "", False)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 100])
def test_one_node_in_each_window(length, generator):
    for _ in range(20):
        depths = [d for d, _ in exponential_windows(rollout(length), generator)]
        edges = [e for e in (0, 1, 2, 4, 8, 16, 32, 64) if e < length]
        assert len(depths) == len(edges)
        assert all(low <= d < min(high, length) for d, low, high in zip(depths, edges, [*edges[1:], length]))


def test_inclusion_is_the_frequency_and_the_mean_unbiased(generator):
    length, draws = 11, 4000
    values = np.sin(np.arange(length))  # any figure of the nodes
    seen, stated, totals = np.zeros(length), np.zeros(length), []
    for _ in range(draws):
        chosen = exponential_windows(rollout(length), generator)
        for depth, inclusion in chosen:
            seen[depth] += 1
            stated[depth] = inclusion
        totals.append(sum(values[d] / inclusion for d, inclusion in chosen))
    np.testing.assert_allclose(stated, [1, 1, 1 / 2, 1 / 2, *[1 / 4] * 4, *[1 / 3] * 3])
    for low, high in ((2, 4), (4, 8), (8, 11)):
        assert stats.chisquare(seen[low:high]).pvalue > 1e-3
    error = np.std(totals) / np.sqrt(draws)
    assert error > 0
    assert abs(np.mean(totals) - values.sum()) < 3.5 * error


def test_every_node(generator):
    assert every_node(rollout(3), generator) == [(0, 1.0), (1, 1.0), (2, 1.0)]


def test_select_goes_through_the_rollouts_in_order():
    nodes = select_nodes(lambda r, g: every_node(r, g)[::-1], [rollout(2), rollout(1)], Randomness(0))
    assert [(n.rollout, n.depth) for n in nodes] == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("bad", [(3, 1.0), (-1, 1.0), (0, 0.0), (0, 1.5), (0, float("nan"))])
def test_impossible_choices(bad):
    with pytest.raises(ValueError, match=r"`nodes` must choose depths in \[0, 3\) with a probability in \(0, 1\]"):
        select_nodes(lambda r, g: [bad], [rollout(3)], Randomness(0))


@pytest.mark.parametrize("length", [1, 2, 5, 16, 100, 4096])
def test_balanced_nodes_weigh_nearly_alike_and_reach_every_depth(length, generator):
    weights, depths, draws = [], set(), 300
    for _ in range(draws):
        chosen = BalancedNodes()(rollout(length), generator)
        assert len(chosen) == len(exponential_windows(rollout(length), generator))
        weights += [1 / inclusion for _, inclusion in chosen]
        depths |= {depth for depth, _ in chosen}
    weights = np.array(weights)
    assert weights.sum() ** 2 / len(weights) / (weights**2).sum() > 0.8, "Kish's effective share"
    assert weights.sum() / draws == pytest.approx(length, rel=0.05)
    assert {0, length - 1} <= depths or length == 4096


def test_balanced_nodes_are_drawn_with_their_stated_probability(generator):
    length, draws = 11, 4000
    seen, stated = np.zeros(length), np.zeros(length)
    for _ in range(draws):
        for depth, inclusion in BalancedNodes()(rollout(length), generator):
            seen[depth] += 1
            stated[depth] = inclusion
    assert stated.sum() == pytest.approx(5)
    z_scores = (seen / draws - stated) / np.sqrt(stated * (1 - stated) / draws + 1e-12)
    assert np.abs(z_scores).max() < 4


@pytest.mark.parametrize("count", [0, True, 1.5])
def test_balanced_nodes_need_a_count(count):
    with pytest.raises(ValueError, match="`count` must be a positive integer"):
        BalancedNodes(count)
