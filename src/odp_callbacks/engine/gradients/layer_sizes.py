"""The sizes of a model's layers, read from its parameters: every family gives them other names in its configuration."""

from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from odp_callbacks.engine.module_attributes import module_attribute

COMMON_HEAD_SIZE = 64
"""Features of an attention head where its module does not say it."""


class LayerSizes(NamedTuple):
    """Sizes that the memory of a forward pass depends on.

    Attributes:
        hidden: Features of the hidden states.
        widest: Features of the widest layer, usually the first of a feed-forward block.
        heads: Query heads of the attention with the most heads.
    """

    hidden: int
    widest: int
    heads: int


def layer_sizes(model: nn.Module) -> LayerSizes:
    """Read the sizes of a model's layers from its linear layers and its attention modules.

    Args:
        model: A causal language model.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> layer_sizes(GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)))
        LayerSizes(hidden=8, widest=32, heads=2)
    """
    layers = list(_layers(model).values())
    shapes = [shape for shape in map(_features, layers) if shape is not None]
    # Most layers of a block read or write hidden states.
    counted = Counter(features for shape in shapes for features in set(shape))
    hidden = counted.most_common(1)[0][0] if counted else 1
    widest = max((max(shape) for shape in shapes), default=hidden)
    heads = max((_head_count(module) for module in layers), default=0)
    return LayerSizes(hidden, widest, heads or max(1, hidden // COMMON_HEAD_SIZE))


def linear_features(model: nn.Module) -> int:
    """Features that all linear layers read and write together, without those of the output head.

    Args:
        model: A causal language model.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> linear_features(GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)))
        128
    """
    # A layer with LoRA and the layer that it wraps are one.
    layers = [module for name, module in _layers(model).items() if not name.endswith(".base_layer")]
    return sum(sum(shape) for shape in map(_features, layers) if shape is not None)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, without the output head and LoRA's own."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    of_head = set() if head is None else {id(module) for module in head.modules()}
    return {
        name: module for name, module in model.named_modules() if id(module) not in of_head and ".lora_" not in name
    }


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Features that a linear layer reads and writes; None for other modules."""
    input_size, output_size = module_attribute(module, "in_features"), module_attribute(module, "out_features")
    if isinstance(input_size, int) and isinstance(output_size, int):
        return input_size, output_size
    output_size = module_attribute(module, "nf")  # transformers' Conv1D, whose weight is transposed
    weight = module_attribute(module, "weight")
    return (int(weight.shape[0]), output_size) if isinstance(output_size, int) and weight is not None else None


def _head_count(module: nn.Module) -> int:
    """Query heads of an attention module; 0 for other modules."""
    for name in ("num_heads", "num_attention_heads", "n_head", "n_heads"):
        if isinstance(count := module_attribute(module, name), int):
            return count
    head_size = module_attribute(module, "head_dim")
    if not isinstance(head_size, int) or head_size <= 0:
        return 0
    for name in ("q_proj", "q_b_proj", "o_proj", "qkv_proj"):
        projection = module_attribute(module, name)
        size = getattr(projection, "in_features" if name == "o_proj" else "out_features", None)
        if isinstance(size, int):
            return size // head_size
    return 0
