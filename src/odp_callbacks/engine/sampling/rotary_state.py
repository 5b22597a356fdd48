"""Position embeddings that remember the longest sequence so far, and rotate shorter ones by it ("dynamic" scaling)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.module_attributes import module_attribute

LONGEST_SO_FAR = "max_seq_len_cached"
"""Ending of the attributes in which transformers' rotary embeddings remember the longest sequence."""


@contextmanager
def preserving_rotary_state(*models: nn.Module) -> Iterator[None]:
    """Restore afterwards what the rotary embeddings of models remember.

    Args:
        *models: The models.
    """
    states = [
        (module, _plain_attributes(module), dict(module._buffers))
        for model in models
        for module in model.modules()
        if module_attribute(module, LONGEST_SO_FAR) is not None
    ]
    try:
        yield
    finally:
        for module, attributes, buffers in states:
            module.__dict__.update(attributes)
            module._buffers.update(buffers)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers and tensors that a module holds as plain attributes."""
    return {name: value for name, value in vars(module).items() if isinstance(value, int | float | Tensor)}


def dynamic_rotaries(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of ``model`` whose frequencies depend on the longest sequence so far."""
    return [
        module
        for module in model.modules()
        if module_attribute(module, LONGEST_SO_FAR) is not None
        and "dynamic" in str(module_attribute(module, "rope_type"))
    ]


def forget_lengths(rotaries: list[nn.Module]) -> None:
    """Let rotary embeddings forget what they have seen, so that the next forward pass is that of a new model.

    Args:
        rotaries: From :func:`dynamic_rotaries`.
    """
    for module in rotaries:
        state: Any = module
        for name in [name for name in vars(module) if name.endswith(LONGEST_SO_FAR)]:
            prefix = name.removesuffix(LONGEST_SO_FAR)
            original = getattr(state, f"{prefix}original_inv_freq", None)
            frequencies = getattr(state, f"{prefix}inv_freq", None)
            if not isinstance(original, torch.Tensor) or not isinstance(frequencies, torch.Tensor):
                continue
            module.register_buffer(f"{prefix}inv_freq", original.to(frequencies.device), persistent=False)
            setattr(module, name, state.original_max_seq_len)


class FixedRotaries:
    """Rotary embeddings with the frequencies of a given length, which a forward pass does not change.

    A forward pass in forward mode must not change the model, and transformers' embeddings with long-rope or dynamic
    scaling write their frequencies.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rotaries = [
            module
            for module in model.modules()
            if any(kind in str(module_attribute(module, "rope_type")) for kind in ("dynamic", "longrope"))
        ]
        self._dynamic = dynamic_rotaries(model)
        self._buffers: dict[int, list[dict[str, Any]]] = {}

    def prepare(self, length: int) -> None:
        """Compute the frequencies for sequences of ``length`` tokens, outside of any transformation."""
        if length in self._buffers:
            return
        forget_lengths(self._dynamic)
        with torch.no_grad():
            for module in self._rotaries:
                device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
                positions = torch.arange(length, device=device)[None]
                rope_types: Any = module.rope_type
                for layer_type in rope_types if isinstance(rope_types, dict) else (None,):
                    named = {} if layer_type is None else {"layer_type": layer_type}
                    module(torch.zeros(1, device=device), positions, **named)
        self._buffers[length] = [
            {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
            for module in self._rotaries
        ]

    @contextmanager
    def at(self, length: int) -> Iterator[None]:
        """Use these frequencies within the block."""
        if not self._rotaries:
            yield
            return
        self.prepare(length)
        states = [(module, dict(module._buffers), module.rope_type) for module in self._rotaries]
        try:
            for module, buffers in zip(self._rotaries, self._buffers[length], strict=True):
                own_type: Any = module.rope_type
                # The update of the frequencies knows no such type, and leaves them alone.
                fixed: Any = dict.fromkeys(own_type, "fixed") if isinstance(own_type, dict) else "fixed"
                module.rope_type = fixed
                module._buffers.update(buffers)
            yield
        finally:
            for module, own_buffers, own_type in states:
                module._buffers.update(own_buffers)
                module.rope_type = own_type
