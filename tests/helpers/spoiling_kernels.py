"""Kernels that write into what they have saved, as Liger's do: the first backward through their graph is right."""

from typing import Any

import torch
from torch import Tensor, nn


class SpoilingSwiGLU(torch.autograd.Function):
    """``silu(a) * b`` whose backward writes the gradients into the saved ``a`` and ``b``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (a, b) = gradients, ctx.saved_tensors
        sigmoid = torch.sigmoid(a)
        of_a = gradient * b * (sigmoid * (1 + a * (1 - sigmoid)))
        of_b = gradient * a * sigmoid
        # A Triton kernel writes by address, so that autograd does not notice.
        a.data.copy_(of_a)
        b.data.copy_(of_b)
        return a, b


def use_spoiling_kernels(student: Any) -> Any:
    """Put the kernel into every feed-forward block of a model with SwiGLU."""

    def forward_of(block: Any) -> Any:
        return lambda states: block.down_proj(SpoilingSwiGLU.apply(block.gate_proj(states), block.up_proj(states)))

    for layer in student.get_base_model().model.layers:
        layer.mlp.forward = forward_of(layer.mlp)
    return student
