"""Gradient checkpointing: the same gradients from less memory."""

from typing import Any

import pytest
import torch

from odp_callbacks.engine.update.layer_recomputation import recomputed_layers
from tests.engine.update.test_gradient_rows import ADVANTAGES, exact_influences, make_gradients, make_rollouts
from tests.helpers.models import Snapshot, paddable, relative, tiny

SEGMENTS = [0, 1, 1]


def saved_bytes_of_forward(student: Any) -> int:
    """Bytes that a forward pass keeps for its backward."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), recomputed_layers(student):
        student(input_ids=torch.full((4, 32), 6))
    return sum(seen.values())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_are_recomputed_where_the_model_asks_for_it(use_reentrant: bool) -> None:
    student: Any = tiny()
    before = saved_bytes_of_forward(student)
    gradients = make_gradients(student)
    rows, _ = gradients.segment_rows(make_rollouts(), ADVANTAGES, SEGMENTS)
    tangents, exact = exact_influences(student, gradients)
    student.enable_input_require_grads()
    student.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    snapshot = Snapshot(student)
    again, _ = gradients.segment_rows(make_rollouts(), ADVANTAGES, SEGMENTS)
    torch.testing.assert_close(again, rows)
    assert relative(gradients.influences(make_rollouts(), tangents)[0], exact) < 1e-6
    assert saved_bytes_of_forward(student) < 0.5 * before
    assert not any("forward" in module.__dict__ for module in student.modules())
    snapshot.check()


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_layers_are_recomputed_one_by_one_where_the_graph_does_not_fit(family: str) -> None:
    """Rows of segments, rows with weights, and influences, also where forward mode is not possible."""
    student = paddable(family)
    whole, small = make_gradients(student), make_gradients(student)
    small.graphs.max_memory_bytes = 1
    rows, directions = whole.segment_rows(make_rollouts(), ADVANTAGES, SEGMENTS)
    found, _ = small.segment_rows(make_rollouts(), ADVANTAGES, SEGMENTS)
    torch.testing.assert_close(found, rows)
    weights = torch.linspace(0, 1, directions.cotangents.shape[1]).expand(2, -1)
    arguments = make_rollouts(), directions, weights, SEGMENTS
    torch.testing.assert_close(small.weighted_rows(*arguments), whole.weighted_rows(*arguments))
    tangents, exact = exact_influences(student, whole)
    assert relative(small.influences(make_rollouts(), tangents)[0], exact) < 1e-4
    small._forward_mode = False
    assert relative(small.influences(make_rollouts(), tangents)[0], exact) < 1e-4
    small.no_segments = "a test of the other way"
    torch.testing.assert_close(small.segment_rows(make_rollouts(), ADVANTAGES, SEGMENTS)[0], rows)
