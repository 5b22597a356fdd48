"""Arithmetic for the trials of the backends: in half precision, rounding hides what is wrong."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.module_attributes import module_attribute
from odp_callbacks.engine.replaced_forward import replaced_forward
from odp_callbacks.engine.sampling.memory import free_bytes

HALF_PRECISION = (torch.float16, torch.bfloat16)


@contextmanager
def exact_arithmetic(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute in float32 at least, and restore it afterwards.

    Weights in half precision are replaced by copies in float32, and autocast is off. Models whose weights are
    quantised, sharded or elsewhere, or whose copies do not fit in memory, compute as they are
    (:func:`computes_exactly`).

    Args:
        model: The model.
    """
    with ExitStack() as stack:
        for device_type in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        stack.enter_context(_without_accelerate_autocast(model))
        if _can_be_copied(model):
            stack.enter_context(_in_float32(model))
        yield


def computes_exactly(model: nn.Module) -> bool:
    """Whether ``model`` computes in float32 at least, now."""
    devices: set[str] = set()
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.dtype in HALF_PRECISION:
            return False  # most of the answers, without looking at a thousand other tensors
        devices.add(tensor.device.type)
    return not any(torch.is_autocast_enabled(device) for device in devices - {"meta"}) and not _is_quantised(model)


def _is_quantised(model: nn.Module) -> bool:
    return any(
        not parameter.is_floating_point() or parameter.element_size() == 1 for parameter in model.parameters()
    ) or bool(getattr(getattr(model, "config", None), "quantization_config", None))


def _can_be_copied(model: nn.Module) -> bool:
    """Whether weights in half precision can be replaced by copies in float32."""
    parameters = list(model.parameters())
    half = [parameter for parameter in parameters if parameter.dtype in HALF_PRECISION]
    configs = [module_attribute(module, "config") for module in model.modules()]
    # The flash attention package has kernels for half precision only.
    if any("flash" in str(getattr(config, "_attn_implementation", "")) for config in configs) or _is_quantised(model):
        return False
    # Tensors of another class, or with attributes of DeepSpeed's, are parts of weights on other devices.
    if not half or any(
        type(parameter.data) is not Tensor or parameter.is_meta or hasattr(parameter, "ds_id") or not parameter.numel()
        for parameter in half
    ):
        return False
    copies: dict[torch.device, int] = {}
    for parameter in half:
        copies[parameter.device] = copies.get(parameter.device, 0) + 4 * parameter.numel()
    return all(size <= free_bytes(device) for device, size in copies.items())


@contextmanager
def _without_accelerate_autocast(model: nn.Module) -> Iterator[None]:
    """Call the forward of the model itself: with mixed precision, accelerate puts autocast inside ``forward``."""
    with ExitStack() as stack:
        for module in model.modules():
            if {"forward", "_original_forward"} <= module.__dict__.keys():
                stack.enter_context(replaced_forward(module, module.__dict__["_original_forward"]))
        yield


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Put copies in the place of all tensors in half precision; the tensors themselves are not touched."""
    copies: dict[int, Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for holder in holders:
                for name, tensor in holder.items():
                    if tensor is None or tensor.dtype not in HALF_PRECISION:
                        continue
                    if id(tensor) not in copies:
                        copy = tensor.detach().float()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                    replaced.append((holder, name, tensor))
                    holder[name] = copies[id(tensor)]
        yield
    finally:
        for holder, name, tensor in replaced:
            holder[name] = tensor
