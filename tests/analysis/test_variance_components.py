import numpy as np
import pytest

from odp_callbacks.analysis.variance_components import VarianceComponents, estimate_components


def test_components_of_an_unbalanced_sample_are_unbiased():
    truth = VarianceComponents(question=2.0, rollout=1.0, node=3.0, continuation=0.5)
    generator = np.random.default_rng(0)
    rollout_sizes = [[3, 1, 4], [2, 5], [1, 1, 6], [4, 2, 2, 3]] * 10
    question = np.concatenate([np.full(sum(sizes), place) for place, sizes in enumerate(rollout_sizes)])
    flat_sizes = [size for sizes in rollout_sizes for size in sizes]
    rollout = np.repeat(np.arange(len(flat_sizes)), flat_sizes)
    estimates = []
    for _ in range(400):
        values = (
            generator.normal(scale=truth.question**0.5, size=len(rollout_sizes))[question]
            + generator.normal(scale=truth.rollout**0.5, size=len(flat_sizes))[rollout]
            + generator.normal(scale=truth.node**0.5, size=len(question))
            + generator.normal(scale=truth.continuation**0.5, size=len(question))
        )
        found = estimate_components(values, question, rollout, np.full(len(question), truth.continuation))
        estimates.append([found.question, found.rollout, found.node, found.continuation])
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / len(estimates) ** 0.5
    wanted = np.array([truth.question, truth.rollout, truth.node, truth.continuation])
    assert (np.abs(mean - wanted) <= 3.5 * error + 1e-9).all(), (mean, error)


def test_components_need_two_of_each():
    with pytest.raises(ValueError, match="two questions"):
        estimate_components(np.arange(4.0), np.zeros(4, int), np.array([0, 0, 1, 1]), np.zeros(4))
