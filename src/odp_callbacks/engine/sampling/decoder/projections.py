"""Linear layers that read the same inputs as one matrix product, with their LoRA merged or beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.exact_arithmetic import HALF_PRECISION


@dataclass(frozen=True)
class LinearParts:
    r"""The tensors of one linear layer, :math:`x \mapsto x W^\top + b + x A^\top B^\top`.

    Attributes:
        weight: ``W``, ``(O, I)``.
        bias: ``b``, ``(O,)``; None for none.
        lora_down: ``A`` of all active adapters, ``(R, I)``; None where there is none.
        lora_up: ``B`` of the same, times their scales, ``(O, R)``.
    """

    weight: Tensor
    bias: Tensor | None
    lora_down: Tensor | None
    lora_up: Tensor | None


def linear_parts(module: nn.Module) -> LinearParts:
    """Read a linear layer, with or without LoRA.

    Args:
        module: An ``nn.Linear``, or peft's LoRA layer around one.

    Raises:
        NotImplementedError: If the layer computes something else: a quantised weight, DoRA, dropout in training mode.

    Examples:
        >>> import torch
        >>> parts = linear_parts(nn.Linear(3, 2))
        >>> parts.weight.shape, parts.lora_down
        (torch.Size([2, 3]), None)
    """
    from peft.tuners.lora.layer import Linear as LoraLinear

    if type(module) is nn.Linear:
        return _of_linear(module)
    if type(module) is not LoraLinear:
        raise NotImplementedError(f"a layer is a {type(module).__name__}")
    layer: Any = module
    if type(layer.base_layer) is not nn.Linear:
        raise NotImplementedError(f"LoRA is on a {type(layer.base_layer).__name__}")
    base = _of_linear(layer.base_layer)
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not adapters:
        if layer.merged and layer.disable_adapters:
            raise NotImplementedError("a merged adapter is disabled")
        return base
    downs, ups = [], []
    for name in adapters:
        up = layer.lora_B[name]
        drops_out = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
        if name in layer.lora_variant or up.bias is not None or drops_out:
            raise NotImplementedError("an adapter is not plain LoRA in evaluation mode")
        downs.append(layer.lora_A[name].weight.detach())
        ups.append(up.weight.detach() * layer.scaling[name])
    return LinearParts(base.weight, base.bias, torch.cat(downs), torch.cat(ups, dim=1))


def _of_linear(layer: nn.Linear) -> LinearParts:
    if type(layer.weight.data) is not Tensor or not layer.weight.is_floating_point() or layer.weight.is_meta:
        raise NotImplementedError(f"a weight is a {type(layer.weight.data).__name__} of {layer.weight.dtype}")
    bias = None if layer.bias is None else layer.bias.detach()
    return LinearParts(layer.weight.detach(), bias, None, None)


@dataclass(frozen=True)
class Projection:
    """Linear layers that read the same inputs.

    Attributes:
        weights: ``(I, O_i)`` each, transposed; their outputs lie beside each other.
        bias: ``(O,)``; None for none.
        lora_down: ``(I, R)``, transposed; None where the LoRA is merged or there is none.
        lora_up: ``(R, O)``, transposed and scaled.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None
    lora_down: Tensor | None
    lora_up: Tensor | None

    @classmethod
    def of(
        cls,
        parts: Sequence[LinearParts],
        dtype: torch.dtype,
        order: Tensor | None = None,
        *,
        merge: bool,
    ) -> "Projection":
        """Put linear layers that read the same inputs together.

        Args:
            parts: The layers.
            dtype: In which they compute.
            order: ``(O,)``, the rows of all weights in the order of the outputs; None: as they are.
            merge: Whether LoRA is added to the weights, in a copy. In half precision that would lose most of it, since
                its elements are smaller than the spacing of the weights.
        """
        assert not (merge and dtype in HALF_PRECISION)
        bias = _joined_bias(parts, dtype)
        weights = tuple(_merged(part).to(dtype) if merge else part.weight.to(dtype) for part in parts)
        if order is not None or (merge and len(parts) > 1):
            weights = (torch.cat(weights),)
        lora_down, lora_up = (None, None) if merge else _stacked_lora(parts, dtype)
        if order is not None:
            weights = (weights[0][order],)
            bias = bias if bias is None else bias[order]
            lora_up = lora_up if lora_up is None else lora_up[order]
        return cls(
            tuple(weight.t() for weight in weights),
            bias,
            None if lora_down is None else lora_down.t(),
            None if lora_up is None else lora_up.t(),
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            inputs: ``(B, I)``.

        Returns:
            ``(B, O)``.
        """
        if len(self.weights) == 1:
            (weight,) = self.weights
            outputs = torch.mm(inputs, weight) if self.bias is None else torch.addmm(self.bias, inputs, weight)
        else:
            widths = [weight.shape[1] for weight in self.weights]
            outputs = inputs.new_empty(len(inputs), sum(widths))
            for weight, part in zip(self.weights, outputs.split(widths, dim=1), strict=True):
                torch.mm(inputs, weight, out=part)
            if self.bias is not None:
                outputs.add_(self.bias)
        if self.lora_down is not None and self.lora_up is not None:
            outputs.addmm_(torch.mm(inputs, self.lora_down), self.lora_up)
        return outputs

    def add(self, inputs: Tensor, sums: Tensor) -> None:
        """Add the outputs to sums.

        Args:
            inputs: ``(B, I)``.
            sums: ``(B, O)``, changed in place; its dtype may be wider than that of the inputs.
        """
        if sums.dtype != inputs.dtype:
            sums.add_(self(inputs))
            return
        (weight,) = self.weights
        sums.addmm_(inputs, weight)
        if self.bias is not None:
            sums.add_(self.bias)
        if self.lora_down is not None and self.lora_up is not None:
            sums.addmm_(torch.mm(inputs, self.lora_down), self.lora_up)


@dataclass(frozen=True)
class CalledLayers:
    """Layers that read the same inputs and are called one by one: quantised weights, or another kind of adapter.

    Attributes:
        modules: The layers.
        order: ``(O,)`` int64, as in :meth:`Projection.of`; None: their outputs as they are.
    """

    modules: tuple[nn.Module, ...]
    order: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Compute the outputs ``(B, O)`` of inputs ``(B, I)``."""
        parts = [module(inputs) for module in self.modules]
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return outputs if self.order is None else outputs[:, self.order]

    def add(self, inputs: Tensor, sums: Tensor) -> None:
        """Add the outputs to sums ``(B, O)``, in place."""
        sums.add_(self(inputs))


def _merged(parts: LinearParts) -> Tensor:
    if parts.lora_down is None or parts.lora_up is None:
        return parts.weight
    weight = parts.weight
    return torch.addmm(weight, parts.lora_up.to(weight.dtype), parts.lora_down.to(weight.dtype))


def _joined_bias(parts: Sequence[LinearParts], dtype: torch.dtype) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
    return torch.cat(biases).to(dtype)


def _stacked_lora(parts: Sequence[LinearParts], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """All A matrices above each other, and a block for each B matrix, so that two products serve all layers."""
    pairs = [(part.lora_down, part.lora_up) for part in parts]
    downs = [down for down, _ in pairs if down is not None]
    if not downs:
        return None, None
    ups = [part.weight.new_zeros(len(part.weight), 0) if part.lora_up is None else part.lora_up for part in parts]
    return torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype)
