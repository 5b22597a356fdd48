"""How much memory backward passes take, and what is done where it does not suffice."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from odp_callbacks.engine.gradients.graph_trial import GraphVerdict
from odp_callbacks.engine.gradients.layer_sizes import layer_sizes, linear_features
from odp_callbacks.engine.gradients.layer_tape import recomputable_layers
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.update.batches import KEPT_TENSORS, is_out_of_memory

BATCHED_TOKENS = {"cpu": 2048}
"""Directions times tokens in one backward pass, at most; larger batches do not fit a CPU's cache."""
ACCELERATOR_BATCHED_TOKENS = 2**16
"""The same on other devices."""
LEAST_BYTES = 1.0
"""As a limit: as little memory as possible."""

Result = TypeVar("Result")


def graph_bytes(model: nn.Module, tokens: int) -> float:
    """Memory that the graph of a forward pass with the plain attention kernel takes, by an estimate.

    Args:
        model: The student.
        tokens: Tokens of the sequence.
    """
    element = max(4, next(model.parameters()).element_size())
    layers, heads = len(recomputable_layers(model)), layer_sizes(model).heads
    return element * (KEPT_TENSORS * tokens * linear_features(model) + layers * heads * tokens**2)


def recomputes_layers(model: nn.Module, verdict: GraphVerdict, tokens: int, max_memory_bytes: float | None) -> bool:
    """Whether layers are computed again in the backward passes: the whole graph does not fit, or serves only once.

    Args:
        model: The student.
        verdict: What was found of it.
        tokens: Tokens of the sequence.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.

    Raises:
        ValueError: If neither way gives the model's gradients.
    """
    if verdict.why_no_tape:
        verdict.require_reusable()
        return False
    memory = free_bytes(next(model.parameters()).device, max_memory_bytes)
    return not verdict.reusable or graph_bytes(model, tokens) > memory


def max_directions(model: nn.Module, tokens: int, logits: int, max_memory_bytes: float | None = None) -> int:
    """How many directions fit into one backward pass, by an estimate of its memory.

    Args:
        model: The student.
        tokens: Tokens that the backward pass visits.
        logits: Numbers in the logits that it starts from.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.

    Returns:
        At least 1.
    """
    sizes = layer_sizes(model)
    parameter = next(model.parameters())
    # The widest activations of a layer and its attention weights, and the same again for their gradients.
    numbers = 2 * tokens * (4 * sizes.widest + 6 * sizes.hidden + 3 * sizes.heads * tokens) + 2 * logits
    fitting = free_bytes(parameter.device, max_memory_bytes) // (numbers * max(4, parameter.element_size()))
    return max(1, min(int(fitting), useful_directions(model, tokens)))


def useful_directions(model: nn.Module, tokens: int) -> int:
    """How many directions go through a model together, at most, where memory sets no limit; at least 1.

    Args:
        model: The student.
        tokens: Tokens that each visits.
    """
    device = next(model.parameters()).device
    return max(1, BATCHED_TOKENS.get(device.type, ACCELERATOR_BATCHED_TOKENS) // tokens)


def in_less_memory(function: Callable[[float | None], Result], max_memory_bytes: float | None) -> Result:
    """Call ``function`` with a limit in bytes, and where memory does not suffice, once more with the smallest one.

    Args:
        function: Called with a limit as ``max_memory_bytes``.
        max_memory_bytes: The first limit; None for half of what is free.

    Raises:
        RuntimeError: If memory does not suffice at all.
    """
    try:
        return function(max_memory_bytes)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: the error would hold the tensors of the failed attempt.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn(
        "gradients did not fit into memory and are computed again with less; a smaller "
        "`max_memory_bytes` would avoid the attempt.",
        stacklevel=2,
    )
    return function(LEAST_BYTES)
