import numpy as np
import pytest
import torch
from scipy import stats

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.tree.nodes import every_node, exponential_windows, select_nodes


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
