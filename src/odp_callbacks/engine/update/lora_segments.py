r"""Gradients on the LoRA parameters for segments of a batch, by one backward for each direction.

A LoRA matrix is the weight of a linear layer, :math:`y = x W^\top`. The gradient of a part of the batch is the product
of what the layer read and of the gradient at what it wrote, restricted to the sequences of that part (Goodfellow, 2015,
"Efficient per-example gradient computations", arXiv:1510.01799). So one backward over a batch of many rollouts gives
the gradients of every group of questions and every class of rollouts in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.layer_tape import LayerTape
from odp_callbacks.engine.replaced_forward import replaced_forward
from odp_callbacks.engine.update.backward import WholeGraph
from odp_callbacks.functional.gradients import lora_parameters


class UnknownRowsError(RuntimeError):
    """A LoRA layer reads something whose first axis is not the sequences of the batch."""


@dataclass
class SegmentSums:
    """Where the backward passes of one forward write their gradients.

    Attributes:
        segment_of_row: ``(B,)`` int64, the segment of each sequence of the batch.
        width: Number of LoRA parameters, ``P``.
        anchor: A leaf that every LoRA layer's output depends on, so that a backward visits all of them.
        rows: ``(S, P)`` that the next backward adds to.
    """

    segment_of_row: Tensor
    width: int
    anchor: Tensor
    rows: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, columns: slice, gradients: Tensor) -> None:
        """Add the gradients ``(B, *shape)`` of each sequence to the rows of their segments."""
        flat = gradients.flatten(1)
        flat = flat if flat.dtype == self.rows.dtype else flat.to(self.rows.dtype)
        self.rows[:, columns].index_add_(0, self.segment_of_row, flat)


@dataclass(frozen=True)
class SegmentedLinear:
    """A linear layer, and the columns of the rows that belong to its weight and its bias.

    Attributes:
        linear: The layer.
        weight: Columns of its weight; None if it is not trained.
        bias: Columns of its bias; None if there is none or it is not trained.
    """

    linear: nn.Linear
    weight: slice | None
    bias: slice | None


class SegmentedLoraLinears:
    """The linear layers that hold a student's LoRA parameters.

    Args:
        student: Student with LoRA, in evaluation mode.

    Attributes:
        uncovered: Why some LoRA parameters are no weights of linear layers; empty if all are.
    """

    def __init__(self, student: nn.Module) -> None:
        parameters = lora_parameters(student)
        columns, self._width = {}, 0
        for parameter in parameters.values():
            columns[id(parameter)] = slice(self._width, self._width + parameter.numel())
            self._width += parameter.numel()
        linears = _lora_linears(student)
        self.uncovered = _why_uncovered(student, parameters, linears)
        layers = [SegmentedLinear(one, columns.get(id(one.weight)), columns.get(id(one.bias))) for one in linears]
        self._layers = [layer for layer in layers if layer.weight is not None or layer.bias is not None]

    @contextmanager
    def recording(self, segment_of_row: Tensor) -> Iterator[SegmentSums]:
        """Within the block, forward passes remember what :func:`segment_gradients` needs.

        Args:
            segment_of_row: ``(B,)`` int64 on the student's device, the segment of each sequence of the batch.
        """
        anchor = torch.zeros((), device=segment_of_row.device, requires_grad=True)
        sums = SegmentSums(segment_of_row, self._width, anchor)
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(replaced_forward(layer.linear, _forward_of(layer, sums)))
            yield sums


def _why_uncovered(student: nn.Module, parameters: Mapping[str, nn.Parameter], linears: Sequence[nn.Linear]) -> str:
    """Why some LoRA parameters are not only the weights of linear layers; empty if all are."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    held = {id(parameter): parameter for linear in linears for parameter in linear.parameters()}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if missing:
        return f"{missing[0]} is no weight of a linear layer"
    if len({parameter.data_ptr() for parameter in held.values()}) < len(held):
        return "some LoRA parameters share their memory"
    for name, layer in student.named_modules():
        if isinstance(layer, ParamWrapper):
            return f"{name} adapts a parameter and not a layer"
        if isinstance(layer, LoraLayer) and set(getattr(layer, "lora_variant", ())) & set(layer.active_adapters):
            return f"{name} is a variant of LoRA"
    return ""


def segment_gradients(graph: LayerTape | WholeGraph, sums: SegmentSums, cotangents: Tensor, segments: int) -> Tensor:
    """Send directions on the hidden states back, and sum the gradients of each segment.

    Args:
        graph: A forward pass within :meth:`SegmentedLoraLinears.recording`, whose outputs are ``(N, H)``.
        sums: Of that recording.
        cotangents: ``(R, N, H)``. A backward is done for those that are not zero.
        segments: ``S``.

    Returns:
        ``(S, R, P)`` in float32 or wider.
    """
    dtype = torch.promote_types(graph.outputs.dtype, torch.float32)
    rows = torch.zeros(segments, len(cotangents), sums.width, dtype=dtype, device=sums.segment_of_row.device)
    wanted = [index for index, cotangent in enumerate(cotangents) if cotangent.any()]

    def write_into_rows(place: int) -> None:
        sums.rows = rows[:, wanted[place]]

    if wanted:
        for _ in graph.gradients(cotangents[wanted], write_into_rows, sums.anchor):
            pass  # the layers write their gradients into the rows
    sums.rows = torch.empty(0)
    return rows


class _SegmentedProduct(torch.autograd.Function):
    """A linear layer whose backward writes the gradients of its parameters into the rows of their segments."""

    @staticmethod
    def forward(context: Any, states: Tensor, anchor: Tensor, layer: SegmentedLinear, sums: SegmentSums) -> Tensor:
        context.save_for_backward(states)
        context.layer, context.sums = layer, sums
        return nn.functional.linear(states, layer.linear.weight, layer.linear.bias)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (states,) = gradients, context.saved_tensors
        layer: SegmentedLinear = context.layer
        sums: SegmentSums = context.sums
        if states.dim() < 3 or len(states) != len(sums.segment_of_row):
            raise UnknownRowsError(f"a LoRA layer reads a tensor of shape {tuple(states.shape)}")
        wrote, read, weight = gradient, states, layer.linear.weight
        if states.dim() > 3:
            wrote, read = gradient.flatten(1, -2), states.flatten(1, -2)  # (B, T, out), (B, T, in)
        if read.dtype != gradient.dtype:
            read = read.to(gradient.dtype)
        if layer.weight is not None:
            sums.add(layer.weight, torch.bmm(wrote.mT, read))
        if layer.bias is not None:
            sums.add(layer.bias, wrote.sum(dim=1))
        if not context.needs_input_grad[0]:
            return None, None, None, None
        backward = gradient @ (weight if weight.dtype == gradient.dtype else weight.to(gradient.dtype))
        return backward if backward.dtype == states.dtype else backward.to(states.dtype), None, None, None


def _forward_of(layer: SegmentedLinear, sums: SegmentSums) -> Callable[[Tensor], Tensor]:
    def forward(states: Tensor) -> Tensor:
        output: Tensor = _SegmentedProduct.apply(states, sums.anchor, layer, sums)  # type: ignore[no-untyped-call]
        return output

    return forward


def _lora_linears(student: nn.Module) -> list[nn.Linear]:
    """The plain linear layers of the student's active adapters, each once."""
    from peft.tuners.lora import LoraLayer

    linears: dict[int, nn.Linear] = {}
    for layer in (module for module in student.modules() if isinstance(module, LoraLayer)):
        for container in (getattr(layer, name) for name in layer.adapter_layer_names):
            for adapter in layer.active_adapters:
                module: Any = dict(container.items()).get(adapter)
                if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                    linears[id(module)] = module
    return list(linears.values())
