import numpy as np
import pytest
import torch

from odp_callbacks.engine.gradients.random_projection import (
    projected_gram_matrices,
    projection_is_cheaper,
    supports_projection,
)
from odp_callbacks.engine.gradients.vjp import node_gram_matrices
from tests.helpers.models import Snapshot, tiny

IDS = torch.tensor([1, 5, 6, 9, 7, 8, 11, 6, 5])
POSITIONS = [2, 8, 5]


def directions():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(c, 12, generator=generator, dtype=torch.float64) for c in (3, 1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("max_memory_bytes", [None, 1])
def test_estimates_are_unbiased_with_the_stated_error(family, max_memory_bytes):
    """Means over draws, and the spread of cosines, against the exact Gram matrices."""
    model = tiny(family)
    exact = [g.sum(0).numpy() for g in node_gram_matrices(model, IDS, POSITIONS, directions()).grams]
    projections, draws = 32, 40
    estimates: list[list[np.ndarray]] = [[], [], []]
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        for n, gram in enumerate(
            projected_gram_matrices(
                model, IDS, POSITIONS, directions(), projections, generator, max_memory_bytes=max_memory_bytes
            )
        ):
            assert gram.shape == (1, *exact[n].shape)
            estimates[n].append(gram[0].numpy())
        if max_memory_bytes is not None:
            return
    for grams, truth in zip(estimates, exact, strict=True):
        drawn = np.stack(grams)
        size = np.sqrt(np.outer(np.diag(truth), np.diag(truth)))
        # With random signs the variance of an inner product is at most that with Gaussian directions.
        spread = np.sqrt((size**2 + truth**2) / (projections * draws))
        assert (np.abs(drawn.mean(0) - truth) < 4.5 * spread).all()
        lengths = np.sqrt(np.einsum("dii->di", drawn))
        cosines = drawn / (lengths[:, :, None] * lengths[:, None])
        true_cosines = truth / size
        off_diagonal = ~np.eye(len(true_cosines), dtype=bool)
        errors = (cosines.std(0) / np.maximum((1 - true_cosines**2) / np.sqrt(projections), 1e-12))[off_diagonal]
        assert errors.size == 0 or (0.5 < np.median(errors) < 1.6)


def test_many_projections_converge_to_the_exact_gram_matrices(student):
    exact = node_gram_matrices(student, IDS, POSITIONS, directions()).grams
    estimates = projected_gram_matrices(student, IDS, POSITIONS, directions(), 20_000, torch.Generator().manual_seed(0))
    for gram, expected in zip(estimates, exact, strict=True):
        torch.testing.assert_close(gram[0], expected.sum(0), rtol=0.05, atol=0.03 * float(expected.sum(0).max()))


def test_the_students_state_is_unchanged(student):
    before, state = Snapshot(student), torch.get_rng_state()
    with torch.inference_mode():
        projected_gram_matrices(student, IDS, POSITIONS, directions(), 4, torch.Generator())
    before.check()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_hooks_of_gradient_checkpointing_do_not_stop_projection(student):
    """peft registers them for quantised bases, too; forward mode cannot run them and does without."""
    expected = projected_gram_matrices(student, IDS, POSITIONS, directions(), 4, torch.Generator().manual_seed(1))
    student.enable_input_require_grads()
    hooks = dict(student.get_input_embeddings()._forward_hooks)
    assert supports_projection(student)
    found = projected_gram_matrices(student, IDS, POSITIONS, directions(), 4, torch.Generator().manual_seed(1))
    for gram, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gram, exact)
    assert dict(student.get_input_embeddings()._forward_hooks) == hooks


def test_random_directions_do_not_depend_on_memory(student):
    """With one tangent at a time, and with all together."""
    found, expected = (
        projected_gram_matrices(
            student, IDS, POSITIONS, directions(), 4, torch.Generator().manual_seed(1), max_memory_bytes=memory
        )
        for memory in (1, None)
    )
    for gram, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gram, exact)


def test_projection_is_cheaper_for_many_nodes():
    assert not projection_is_cheaper(None, [1000], [range(1000)], [[9] * 1000])
    assert projection_is_cheaper(64, [1000], [range(1000)], [[9] * 1000])
    assert not projection_is_cheaper(64, [1000], [[999]], [[9]])
