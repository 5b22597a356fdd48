"""Which graph is kept, and what happens where it does not fit."""

import pytest
import torch

from odp_callbacks.engine.gradients.layer_tape import LayerTape
from odp_callbacks.engine.update.backward import WholeGraph
from odp_callbacks.engine.update.student_graphs import StudentGraphs
from tests.helpers.models import tiny
from tests.helpers.spoiling_kernels import use_spoiling_kernels

IDS = torch.tensor([[1, 5, 6, 9]])


def test_layers_are_recomputed_only_where_there_is_a_reason() -> None:
    student = tiny("qwen3")

    def graph(graphs: StudentGraphs) -> LayerTape | WholeGraph:
        return graphs.of(lambda: graphs.student(input_ids=IDS, use_cache=False).logits[0], IDS.numel())

    assert isinstance(graph(StudentGraphs(student)), WholeGraph)
    assert isinstance(graph(StudentGraphs(student, 1)), LayerTape)
    assert isinstance(graph(StudentGraphs(use_spoiling_kernels(tiny("qwen3")))), LayerTape)


def test_a_rollout_that_does_not_fit_is_measured_once_more_with_the_smallest_graph() -> None:
    graphs, limits = StudentGraphs(tiny("qwen3")), list[float | None]()

    def work() -> int:
        limits.append(graphs.max_memory_bytes)
        if graphs.max_memory_bytes is None:
            raise torch.OutOfMemoryError("out of memory")
        return 7

    with pytest.warns(UserWarning, match="gradients did not fit into memory and are computed again with less"):
        assert graphs.in_less_memory(work, [1]) == 7
    assert limits == [None, 1.0]
    assert graphs.max_memory_bytes is None
    with pytest.raises(torch.OutOfMemoryError):  # two are measured in halves
        graphs.in_less_memory(work, [1, 2])
