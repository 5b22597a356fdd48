"""Logits in float32 from a head in half precision: logits of size 16 to 32 are 0.125 apart in bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.replaced_forward import replaced_forward
from odp_callbacks.engine.sampling.exact_arithmetic import HALF_PRECISION
from odp_callbacks.functional.gradients import forward_arguments

CHUNK_ELEMENTS = 2**24
"""Weights of the head that are in float32 at a time, 64 MiB of them."""


@contextmanager
def float32_head(model: nn.Module) -> Iterator[None]:
    """Within the block, the product of hidden states and the head's weights is computed in float32.

    Only the head is: its products are as exact as their inputs, which the body rounds as before. What the model does
    with logits after the head (scaling, soft-capping, LoRA on the head) is done to those in float32. Heads that are no
    plain linear layer of this process (quantised, sharded, offloaded) compute as they are, and so do those of a model
    that gives logits at all positions: they would take twice the memory.

    Args:
        model: A causal language model of transformers, with or without peft.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).bfloat16()
        >>> ids = torch.tensor([[1, 2]])
        >>> with float32_head(model):
        ...     inside = model(ids).logits
        >>> inside.dtype, model(ids).logits.dtype
        (torch.float32, torch.bfloat16)
    """
    head = _plain_head(model)
    if head is None:
        yield
        return
    with replaced_forward(head, lambda hidden: float32_product(hidden, head)):
        yield


def float32_product(hidden: Tensor, head: nn.Linear) -> Tensor:
    """The output of a linear layer, in float32, without a whole copy of its weights.

    Args:
        hidden: ``(..., H)``, floating.
        head: A layer with ``(V, H)`` weights.

    Returns:
        ``(..., V)`` float32, or float64 where an input is.
    """
    weight, bias = head.weight, head.bias
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    wide = hidden.to(dtype)
    logits = wide.new_empty(*hidden.shape[:-1], len(weight))
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    with torch.autocast(hidden.device.type, enabled=False):
        for first in range(0, len(weight), rows):
            chunk = slice(first, first + rows)
            logits[..., chunk] = wide @ weight[chunk].to(dtype).T
        return logits if bias is None else logits.add_(bias.to(dtype))


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """The linear layer that gives a model's logits in half precision; None if it is another layer, or is exact."""
    if "logits_to_keep" not in forward_arguments(model):
        return None
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if hasattr(head, "get_base_layer"):  # LoRA on the head adds to the output of this layer
        head = head.get_base_layer()
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    weight = head.weight
    if type(weight.data) is not Tensor or weight.is_meta or hasattr(weight, "ds_id"):
        return None
    is_half = weight.dtype in HALF_PRECISION or torch.is_autocast_enabled(weight.device.type)
    return head if is_half else None
