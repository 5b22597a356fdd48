"""The sums of gradients, exact and as a count sketch."""

import numpy as np
import pytest
import torch

from odp_callbacks.engine.gradients import step_sums
from odp_callbacks.engine.gradients.step_sums import StepAccumulator, half_coefficients
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes
from tests.helpers.records import synthetic


def random_sums(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    accumulator, explicit = StepAccumulator(size, 2), {}
    for i in range(6):
        key = (str(i % 2), i % 3 == 0)
        vectors = torch.randn(4, size, generator=generator) + torch.randn(1, size, generator=generator)
        accumulator.add_ideal(*key, vectors[:2])
        accumulator.add_distillation(*key, vectors[2:])
        explicit[key] = explicit.get(key, 0) + vectors.double()
    rows = torch.cat(list(explicit.values()))
    return accumulator.sums(), list(explicit), (rows @ rows.mT).reshape(len(explicit), 4, len(explicit), 4).numpy()


def test_sums_of_few_parameters_are_exact():
    sums, keys, expected = random_sums(500)
    assert list(zip(sums.question, sums.correct, strict=True)) == keys
    # The sums are in single precision.
    np.testing.assert_allclose(sums.gram, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_sums_of_many_parameters_are_sketched_within_the_stated_error(monkeypatch):
    monkeypatch.setattr(step_sums, "CHUNK_LENGTH", 2**17)  # several chunks
    size = 200_000
    sums, _, expected = random_sums(size)
    diagonal = np.einsum("gigi->gi", expected)
    scale = np.sqrt(diagonal[:, :, None, None] * diagonal[None, None])
    error = (sums.gram - expected) / scale
    assert np.abs(error).max() < 4 / np.sqrt(step_sums.SKETCH_LENGTH)
    assert np.abs(error).max() > 0


def test_sketches_of_numbers_that_repeat_in_every_block_are_unbiased():
    """The hardest case for blocks that are added: without shuffling, equal numbers would always meet."""
    generator = torch.Generator().manual_seed(1)
    repeated = torch.randn(2, step_sums.SKETCH_LENGTH, generator=generator).repeat(1, 3)
    found = []
    for start in range(12):
        vectors = torch.zeros(2, 5 * 2**20)
        place = start * 3 * step_sums.SKETCH_LENGTH
        vectors[:, place : place + repeated.shape[1]] = repeated
        sketch = step_sums.count_sketch(vectors).double()
        found.append(float(sketch[0] @ sketch[1]))
    exact = float(repeated[0].double() @ repeated[1].double())
    scale = float(repeated[0].norm() * repeated[1].norm()) / np.sqrt(step_sums.SKETCH_LENGTH)
    error = (np.array(found) - exact) / scale
    assert np.std(error) < 2
    assert abs(np.mean(error)) < 3 * 1.5 / np.sqrt(len(found))


def test_without_gradients_the_sums_are_empty():
    assert StepAccumulator(10, 3).sums().gram.shape == (0, 5, 0, 5)


def test_halves_are_disjoint_and_a_single_reward_counts_in_both():
    node = synthetic([0.5, 0.5, 0.25], weight=[0.5, 0.3, 0.2]).record
    outcomes = [
        BranchOutcomes([1.0, 0.0, 1.0], [0, 1, 0]),
        BranchOutcomes([0.0, 1.0], [0, 1]),
        BranchOutcomes([0.25], [0]),
    ]
    coefficients = half_coefficients(node, outcomes)
    assert coefficients.numpy() == pytest.approx(np.array([[0.3 * (0 - 1), 0.2 * (0.25 - 1)], [0.3 * 1, 0.2 * 0.25]]))
