"""Plain backward passes, one for each direction."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from odp_callbacks.engine.gradients.layer_tape import side_by_side


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


class WholeGraph:
    """A forward pass that keeps the graph of all layers; its counterpart for less memory is ``LayerTape``.

    Args:
        run: Runs a model and returns what is differentiated, ``(N, F)``.
        parameters: Leaves of the graph, by name.

    Attributes:
        outputs: ``(N, F)``, what ``run`` returned.
    """

    def __init__(self, run: Callable[[], Tensor], parameters: Mapping[str, Tensor] | None = None) -> None:
        self._parameters = dict(parameters or {})
        self.outputs = run()

    def gradients(
        self, cotangents: Tensor, before_direction: Callable[[int], None] | None = None, anchor: Tensor | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Send directions ``(C, N, F)`` back; as :meth:`odp_callbacks.engine.gradients.layer_tape.LayerTape.gradients`.

        Yields:
            The gradients ``(C, *shape)`` of all parameters, by name.
        """
        leaves = [*self._parameters.values(), *([] if anchor is None else [anchor])]
        columns: list[list[Tensor]] = [[] for _ in self._parameters]
        for index, direction in enumerate(cotangents if self.outputs.requires_grad else ()):
            if before_direction is not None:
                before_direction(index)
            found = torch.autograd.grad(
                self.outputs, leaves, direction.to(self.outputs), retain_graph=True, allow_unused=True
            )
            for column, gradient, leaf in zip(columns, found, leaves, strict=False):
                column.append(torch.zeros_like(leaf) if gradient is None else gradient)
        yield {name: torch.stack(column) for name, column in zip(self._parameters, columns, strict=True) if column}

    def flat_gradients(self, cotangents: Tensor) -> Tensor:
        """The gradients of all parameters side by side, ``(C, P)`` on the CPU, in float32 or wider.

        Args:
            cotangents: ``(C, N, F)``.
        """
        return side_by_side(self.gradients(cotangents), self._parameters, len(cotangents))
