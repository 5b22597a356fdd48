"""Tangents of hidden states along directions on the LoRA parameters, for all positions of a batch at once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.gradients.chunked_attention import CHUNK_NUMBERS, ChunkedAttention
from odp_callbacks.engine.gradients.layer_sizes import layer_sizes
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.functional.gradients import lora_parameters

ATTENTION_COPIES = 4
"""Arrays of the size of a chunk of attention scores that a direction holds."""


def tangents_of_states(
    states: Callable[[dict[str, Tensor]], Tensor],
    student: nn.Module,
    parameters: dict[str, Tensor],
    tangents: Mapping[str, Tensor],
    *,
    at_a_time: int | None = None,
) -> Tensor:
    """Push directions on the parameters forward.

    Args:
        states: Maps values of the parameters to hidden states ``(N, H)`` of ``student``.
        student: The student.
        parameters: Its LoRA parameters, detached.
        tangents: For each parameter ``(S, *shape)``.
        at_a_time: Directions that go through one pass together, at most; None for all.

    Returns:
        ``(S, N, H)``.
    """

    def pushed_forward(tangent: dict[str, Tensor]) -> Tensor:
        pushed: Tensor = torch.func.jvp(states, (parameters,), (tangent,))[1]
        return pushed

    typed = {name: tangents[name].to(p) for name, p in parameters.items()}
    # Only plain attention has a forward mode. Models with attention of their own compute it in one piece.
    with sdpa_kernel(SDPBackend.MATH), ChunkedAttention(), without_input_gradient_hooks(student):
        moved: Tensor = torch.func.vmap(pushed_forward, chunk_size=at_a_time)(typed)
    return moved


def tangents_in_memory(model: nn.Module, tokens: int, max_memory_bytes: float | None) -> int:
    """How many directions may go forward through a batch together, by an estimate; at least 1.

    Args:
        model: The student.
        tokens: Tokens of the batch, with its padding.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.
    """
    parameter = next(model.parameters())
    trained = parameter.element_size() * sum(p.numel() for p in lora_parameters(model).values())
    scores = 4 * ATTENTION_COPIES * min(CHUNK_NUMBERS, layer_sizes(model).heads * tokens**2)
    of_tangent = tokens * bytes_of_tangent(model) + scores + 2 * trained
    # The pass that they ride on takes as much as one of them.
    return max(1, int(free_bytes(parameter.device, max_memory_bytes) // of_tangent) - 1)


def bytes_of_tangent(model: nn.Module) -> float:
    """Memory that a direction on its way forward takes for each token, without attention."""
    sizes = layer_sizes(model)
    return max(4, next(model.parameters()).element_size()) * (4 * sizes.widest + 6 * sizes.hidden)


@contextmanager
def without_input_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Take out the hooks that make inputs require gradients, and put them back as they were.

    transformers and peft register them on the input embeddings for gradient checkpointing. A forward pass in forward
    mode cannot run them, and does not need them.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    hooks = {} if embeddings is None else embeddings._forward_hooks
    before = dict(hooks)
    try:
        for key, hook in before.items():
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del hooks[key]
        yield
    finally:
        hooks.clear()
        hooks.update(before)
