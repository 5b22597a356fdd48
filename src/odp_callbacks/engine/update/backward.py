"""Plain backward passes, one for each direction."""

import torch
from torch import Tensor


def vector_jacobian_products(
    outputs: Tensor, leaves: list[Tensor], directions: Tensor, *, retain_graph: bool = False
) -> list[Tensor]:
    """Gradients ``(C, *shape)`` of ``outputs`` for directions ``(C, *outputs.shape)``, one backward each.

    A batch of rollouts fills the processor; several directions at once would only need more memory.

    Args:
        outputs: Any shape, with its graph.
        leaves: What it is differentiated by.
        directions: ``(C, *outputs.shape)``.
        retain_graph: Keep the graph for another call.
    """
    columns: list[list[Tensor]] = [[] for _ in leaves]
    for index, direction in enumerate(directions):
        gradients = torch.autograd.grad(
            outputs,
            leaves,
            direction.to(outputs),
            retain_graph=retain_graph or index + 1 < len(directions),
            allow_unused=True,
        )
        for column, gradient, leaf in zip(columns, gradients, leaves, strict=True):
            column.append(torch.zeros_like(leaf) if gradient is None else gradient)
    return [torch.stack(column) for column in columns]
