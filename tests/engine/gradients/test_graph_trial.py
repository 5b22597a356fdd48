"""Right or refused: kernels that spoil their graph, layers that are no chain, forwards that are random."""

from typing import Any

import pytest
import torch

from odp_callbacks.engine.gradients.graph_trial import GraphVerdict, graph_verdict
from odp_callbacks.engine.gradients.vjp import node_gram_matrices, summed_vjps
from odp_callbacks.functional import lora_parameters
from tests.engine.update.test_gradient_rows import ADVANTAGES, make_gradients, make_rollouts
from tests.helpers.models import relative, tiny
from tests.helpers.spoiling_kernels import use_spoiling_kernels

IDS = torch.tensor([1, 5, 6, 9, 7, 8, 11, 6, 5])


def test_most_students_reuse_their_graph_and_recompute_their_layers() -> None:
    assert graph_verdict(tiny("qwen3")) == GraphVerdict(reusable=True, why_no_tape="")


@pytest.mark.filterwarnings("ignore:the student has a layer without forward-mode")
def test_kernels_that_write_into_saved_tensors_get_a_fresh_graph_for_each_direction() -> None:
    plain, spoiling = tiny("qwen3"), use_spoiling_kernels(tiny("qwen3"))
    assert not graph_verdict(spoiling).reusable
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(3, 12, generator=generator, dtype=torch.float64) for _ in range(2)]
    expected = node_gram_matrices(plain, IDS, [3, 8], directions).grams
    for found, exact in zip(node_gram_matrices(spoiling, IDS, [3, 8], directions).grams, expected, strict=True):
        assert relative(found, exact) < 1e-6
    together = torch.stack(directions, dim=1)
    assert relative(summed_vjps(spoiling, IDS, [3, 8], together), summed_vjps(plain, IDS, [3, 8], together)) < 1e-6
    gradients, exact_gradients = make_gradients(spoiling), make_gradients(plain)
    assert gradients.no_segments == ""
    rows, on_states = gradients.segment_rows(make_rollouts(), ADVANTAGES, [0, 1, 1])
    exact_rows, _ = exact_gradients.segment_rows(make_rollouts(), ADVANTAGES, [0, 1, 1])
    assert relative(rows, exact_rows) < 1e-6
    tangents = {
        name: torch.randn(2, *p.shape, generator=generator).double() for name, p in lora_parameters(plain).items()
    }
    influences = gradients.influences(make_rollouts(), tangents, on_states)
    assert relative(influences, exact_gradients.influences(make_rollouts(), tangents)) < 1e-6


def test_kernels_that_spoil_their_graph_are_refused_where_layers_are_no_chain() -> None:
    student: Any = use_spoiling_kernels(tiny("qwen3"))
    layer = student.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda module, arguments: (1 * arguments[0], *arguments[1:]))
    with pytest.raises(ValueError, match=r"`student` has a layer that spoils its graph.*switch off custom kernels"):
        node_gram_matrices(student, IDS, [3], [torch.ones(1, 12).cumsum(1)])


def test_a_student_whose_forward_is_random_is_refused() -> None:
    student: Any = tiny("qwen3")
    student.get_base_model().model.layers[0].mlp.register_forward_hook(
        lambda module, arguments, output: output * torch.rand(1, dtype=output.dtype)
    )
    with pytest.raises(ValueError, match="`student` gives different gradients for the same direction"):
        graph_verdict(student)
