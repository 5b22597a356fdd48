"""The summed gradients and their sketch."""

import numpy as np
import pytest
import torch

from odp_callbacks.engine.gradients import step_sums as steps
from odp_callbacks.engine.gradients.step_sums import StepAccumulator, half_coefficients
from odp_callbacks.engine.tree.continuations import BranchOutcomes
from tests.helpers.records import synthetic


def fill(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sums, explicit = StepAccumulator(size, 2), {}
    for i in range(6):
        key = (str(i % 2), i % 3 == 0)
        vectors = torch.randn(4, size, generator=generator) + torch.randn(1, size, generator=generator)
        sums.add_ideal(*key, vectors[:2])
        sums.add_teachers(*key, vectors[2:])
        explicit[key] = explicit.get(key, 0) + vectors.double()
    rows = torch.cat(list(explicit.values()))
    return sums.sums(), list(explicit), (rows @ rows.mT).reshape(len(explicit), 4, len(explicit), 4).numpy()


def test_small_ones_are_exact():
    found, keys, expected = fill(500)
    assert list(zip(found.question, found.correct, strict=True)) == keys
    # Sums are kept in single precision.
    np.testing.assert_allclose(found.gram, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_large_ones_are_sketched_within_the_stated_error(monkeypatch):
    monkeypatch.setattr(steps, "CHUNK", 70_000)  # several chunks
    size = 200_000
    found, _, expected = fill(size)
    diagonal = np.einsum("gigi->gi", expected)
    scale = np.sqrt(diagonal[:, :, None, None] * diagonal[None, None])
    error = (found.gram - expected) / scale
    assert np.abs(error).max() < 4 / np.sqrt(steps.SKETCH)
    assert np.abs(error).max() > 0


def test_nothing_measured_is_empty():
    assert StepAccumulator(10, 3).sums().gram.shape == (0, 5, 0, 5)


def test_halves_are_disjoint_and_a_lone_reward_serves_both():
    node = synthetic([0.5, 0.5, 0.25], weight=[0.5, 0.3, 0.2]).record
    outcomes = [
        BranchOutcomes([1.0, 0.0, 1.0], [0, 1, 0]),
        BranchOutcomes([0.0, 1.0], [0, 1]),
        BranchOutcomes([0.25], [0]),
    ]
    found = half_coefficients(node, outcomes)
    assert found.numpy() == pytest.approx(np.array([[0.3 * (0 - 1), 0.2 * (0.25 - 1)], [0.3 * 1, 0.2 * 0.25]]))
