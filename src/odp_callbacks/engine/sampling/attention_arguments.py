"""What the layers of a model hand to transformers' attention function."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention import AttentionSwitch


class AttentionArguments(NamedTuple):
    """What one layer hands to the attention function.

    Attributes:
        query_heads: ``H``.
        key_heads: Heads of keys and values.
        head_width: ``D``, of queries, keys and values; 0 where values are of another width.
        scaling: Factor of the scores.
        window: Positions that a query sees, itself included; 0 for all.
        others: Whether there is a cap of the scores, sinks, or a position bias.
    """

    query_heads: int
    key_heads: int
    head_width: int
    scaling: float
    window: int
    others: bool


def attention_arguments(model: nn.Module) -> dict[int, AttentionArguments]:
    """Run one token through a model, and note what each layer hands to the attention function.

    Args:
        model: Causal language model of transformers, in evaluation mode.

    Returns:
        The arguments by the index of the layer; without the layers that attend in another way.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> attention_arguments(LlamaForCausalLM(config).eval())
        {0: AttentionArguments(query_heads=2, key_heads=1, head_width=4, scaling=0.5, window=0, others=False)}
    """
    found: dict[int, AttentionArguments] = {}
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), AttentionSwitch(model, "odp_attention_arguments", _note_arguments).on():
        model(input_ids=token, use_cache=False, noted_arguments=found)
    return found


def _note_arguments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    noted_arguments: dict[int, AttentionArguments],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend to nothing; a function with the signature of transformers' interface."""
    width = query.shape[-1]
    layer: Any = module  # torch types the attributes of modules as tensors
    noted_arguments[layer.layer_idx] = AttentionArguments(
        query.shape[1],
        key.shape[1],
        width if value.shape[-1] == width else 0,
        width**-0.5 if scaling is None else scaling,
        sliding_window or 0,
        any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias")),
    )
    return query.new_zeros(*value.shape[:1], query.shape[2], query.shape[1], value.shape[-1]).to(value.dtype), None
