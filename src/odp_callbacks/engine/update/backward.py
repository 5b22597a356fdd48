"""Plain backward passes, one for each direction."""

import torch
from torch import Tensor

from odp_callbacks.functional.gradients import flatten_gradients


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


def flat_gradients(outputs: Tensor, leaves: dict[str, Tensor], directions: Tensor) -> Tensor:
    """Gradients of ``outputs`` for directions, on all leaves side by side.

    Args:
        outputs: Any shape, with its graph.
        leaves: What it is differentiated by, with ``P`` numbers together.
        directions: ``(C, *outputs.shape)``.

    Returns:
        ``(C, P)`` in float32 or wider.
    """
    gradients = vector_jacobian_products(outputs, list(leaves.values()), directions)
    flat = flatten_gradients(tuple(gradients), leaves)
    return flat if flat.dtype == torch.float64 else flat.float()
