"""Read the layers of a model that is built like Llama, and refuse every other one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention_arguments import AttentionArguments
from odp_callbacks.engine.sampling.decoder.norms import RootMeanSquareNorm
from odp_callbacks.engine.sampling.decoder.projections import CalledLayers, LinearParts, Projection, linear_parts

PARTS_OF_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
PARTS_OF_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PARTS_OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
PARTS_OF_MLP = {"gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class HeadShape:
    """Sizes of the attention.

    Attributes:
        key_heads: Heads of keys and values.
        queries_per_key: Query heads that share one of them.
        width: ``D``, numbers of a head.
    """

    key_heads: int
    queries_per_key: int
    width: int

    @property
    def reserved_places(self) -> int:
        """Positions beside those of a suffix that attention to prompts and responses needs at most."""
        return 2 * self.queries_per_key


@dataclass(frozen=True)
class DecoderLayer:
    """What one layer computes with.

    Attributes:
        attention_norm: Before the attention.
        query_key_value: Its outputs are, for each head of keys: the heads of queries that read it, the key, the value.
        head_norm: Of queries and keys, with a weight ``(queries_per_key + 1, D)``; None for none.
        attention_output: From the heads to the hidden states.
        mlp_norm: Before the feed-forward part.
        gate_up: Its outputs are the gate and what it multiplies.
        activation: Of the gate.
        down: Back to the hidden states.
        attention: Scale and window.
    """

    attention_norm: RootMeanSquareNorm
    query_key_value: Projection | CalledLayers
    head_norm: RootMeanSquareNorm | None
    attention_output: Projection | CalledLayers
    mlp_norm: RootMeanSquareNorm
    gate_up: Projection | CalledLayers
    activation: Callable[[Tensor], Tensor]
    down: Projection | CalledLayers
    attention: AttentionArguments


@dataclass(frozen=True)
class DecoderParts:
    """A model that is built like Llama.

    Attributes:
        embedding: From tokens to hidden states.
        rotary: Gives the cosines and sines of positions.
        layers: In their order.
        norm: After the last layer.
        head: From hidden states to logits.
        heads: Sizes of the attention.
        dtype: In which the layers compute.
    """

    embedding: nn.Module
    rotary: nn.Module
    layers: tuple[DecoderLayer, ...]
    norm: nn.Module
    head: nn.Module
    heads: HeadShape
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.layers[0].attention_norm.weight.device


class LlamaLikeModel:
    """The modules of a model that is built like Llama.

    Args:
        model: Causal language model, with or without LoRA, in evaluation mode.

    Raises:
        NotImplementedError: If the model has another part, or a part that may do something else.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft import PeftModel

        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        head = getattr(base, "get_output_embeddings", lambda: None)()
        body: Any = getattr(base, getattr(base, "base_model_prefix", ""), None)
        if not isinstance(body, nn.Module) or not isinstance(head, nn.Module) or body is base:
            raise NotImplementedError("the model has no body and head")
        self.head, self.body = head, body
        _check_parts(body, PARTS_OF_MODEL)
        self.layers: list[Any] = list(body.get_submodule("layers").children())
        for layer in self.layers:
            _check_parts(layer, PARTS_OF_LAYER)
            _check_parts(layer.self_attn, PARTS_OF_ATTENTION, optional={"q_norm", "k_norm"})
            _check_parts(layer.mlp, PARTS_OF_MLP)
        known = {id(parameter) for module in (self.body, self.head) for parameter in module.parameters()}
        if any(id(parameter) not in known for parameter in base.parameters()):
            raise NotImplementedError("the model has parameters beside its body and head")
        # The wrappers around the whole model are left out: accelerate's casts what it returns.
        _check_plain([*self.body.modules(), *self.head.modules()])
        _check_hooks([model, base])
        self.linear_layers = [
            {name: _LinearGroup(modules) for name, modules in _linear_modules(layer).items()} for layer in self.layers
        ]

    def copied_bytes(self, dtype: torch.dtype, *, merge: bool) -> int:
        """Bytes of the weights that :meth:`parts` copies.

        Args:
            dtype: In which the layers compute.
            merge: Whether LoRA is added to the weights.
        """
        size = torch.empty(0, dtype=dtype).element_size()
        return sum(
            size * sum(part.weight.numel() for part in parts)
            for layer in self.linear_layers
            for name, parts in ((name, group.parts) for name, group in layer.items())
            if parts
            and (
                name == "query_key_value"
                or parts[0].weight.dtype != dtype
                or (merge and (len(parts) > 1 or parts[0].lora_down is not None))
            )
        )

    def parts(self, attention: Mapping[int, AttentionArguments], dtype: torch.dtype, *, merge: bool) -> DecoderParts:
        """Put the weights of each layer together.

        Args:
            attention: What each layer hands to the attention function, by its index.
            dtype: In which the layers compute.
            merge: Whether LoRA is added to copies of the weights.

        Raises:
            NotImplementedError: If the layers attend in another way.
        """
        heads = _head_shape(attention, len(self.layers))
        layers = tuple(
            _decoder_layer(layer, linear, attention[index], heads, dtype, merge)
            for index, (layer, linear) in enumerate(zip(self.layers, self.linear_layers, strict=True))
        )
        return DecoderParts(
            self.body.get_submodule("embed_tokens"),
            self.body.get_submodule("rotary_emb"),
            layers,
            self.body.get_submodule("norm"),
            self.head,
            heads,
            dtype,
        )


def _head_shape(attention: Mapping[int, AttentionArguments], layer_count: int) -> HeadShape:
    """Sizes of the attention, which must be those of every layer."""
    if set(attention) != set(range(layer_count)):
        raise NotImplementedError("a layer does not attend through transformers' attention interface")
    if any(arguments.others or not arguments.head_width for arguments in attention.values()):
        raise NotImplementedError("the attention has a cap, sinks, a position bias, or values of another width")
    shapes = {
        HeadShape(arguments.key_heads, arguments.query_heads // arguments.key_heads, arguments.head_width)
        for arguments in attention.values()
    }
    if len(shapes) != 1:
        raise NotImplementedError("the layers have heads of different shapes")
    return shapes.pop()


class _LinearGroup:
    """Linear layers with the same inputs.

    Attributes:
        modules: The layers.
        parts: Their tensors; none if one of them computes something else than a matrix product with plain LoRA.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        try:
            self.parts: list[LinearParts] = [linear_parts(module) for module in modules]
        except NotImplementedError:
            self.parts = []

    def projection(self, dtype: torch.dtype, order: Tensor | None = None, *, merge: bool) -> Projection | CalledLayers:
        """The layers as one; the arguments are those of :meth:`Projection.of`."""
        if not self.parts:
            return CalledLayers(self.modules, order)
        return Projection.of(self.parts, dtype, order, merge=merge)


def _linear_modules(layer: Any) -> dict[str, list[nn.Module]]:
    """The linear layers of a layer, those with the same inputs together."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "query_key_value": [attention.q_proj, attention.k_proj, attention.v_proj],
        "attention_output": [attention.o_proj],
        "gate_up": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }


def _decoder_layer(
    layer: Any,
    linear: dict[str, _LinearGroup],
    attention: AttentionArguments,
    heads: HeadShape,
    dtype: torch.dtype,
    merge: bool,
) -> DecoderLayer:
    key_rows = heads.key_heads * heads.width
    rows = [getattr(module, "out_features", None) for module in linear["query_key_value"].modules]
    if rows != [key_rows * heads.queries_per_key, key_rows, key_rows]:
        raise NotImplementedError("queries, keys and values are not those of the heads")
    order = _grouped_rows(heads, layer.input_layernorm.weight.device)
    return DecoderLayer(
        RootMeanSquareNorm.of(layer.input_layernorm),
        linear["query_key_value"].projection(dtype, order, merge=merge),
        _head_norm(layer.self_attn, heads),
        linear["attention_output"].projection(dtype, merge=merge),
        RootMeanSquareNorm.of(layer.post_attention_layernorm),
        linear["gate_up"].projection(dtype, merge=merge),
        layer.mlp.act_fn,
        linear["down"].projection(dtype, merge=merge),
        attention,
    )


def _grouped_rows(heads: HeadShape, device: torch.device) -> Tensor:
    """The rows of all queries, all keys and all values, ordered by head of keys."""
    key_heads, width = heads.key_heads, heads.width
    query_rows = key_heads * heads.queries_per_key * width
    queries = torch.arange(query_rows, device=device).view(key_heads, -1)
    keys = query_rows + torch.arange(key_heads * width, device=device).view(key_heads, width)
    return torch.cat([queries, keys, keys + key_heads * width], dim=1).flatten()


def _head_norm(attention: Any, heads: HeadShape) -> RootMeanSquareNorm | None:
    """The norms of queries and keys as one."""
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if query_norm is None and key_norm is None:
        return None
    if query_norm is None or key_norm is None:
        raise NotImplementedError("only queries or only keys have a norm")
    queries, keys = RootMeanSquareNorm.of(query_norm), RootMeanSquareNorm.of(key_norm)
    if queries.epsilon != keys.epsilon or {queries.weight.shape, keys.weight.shape} != {(heads.width,)}:
        raise NotImplementedError("the norms of queries and keys are not those of one head")
    weight = torch.stack([*[queries.weight] * heads.queries_per_key, keys.weight])
    return RootMeanSquareNorm(weight, queries.epsilon)


def _check_parts(module: nn.Module, expected: set[str], optional: set[str] | None = None) -> None:
    """Raise ``NotImplementedError`` unless exactly the expected children have parameters."""
    with_parameters = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    required = {name for name in expected - (optional or set()) if name != "rotary_emb"}
    if unknown := with_parameters - expected:
        raise NotImplementedError(f"{type(module).__name__} has {sorted(unknown)}")
    if missing := required - with_parameters:
        raise NotImplementedError(f"{type(module).__name__} has no {sorted(missing)}")
    if module._parameters:
        raise NotImplementedError(f"{type(module).__name__} has parameters of its own")


def _check_plain(modules: Sequence[nn.Module]) -> None:
    """Raise ``NotImplementedError`` if someone listens to a module, or has replaced what it does."""
    _check_hooks(modules)
    for module in modules:
        if "forward" in module.__dict__:
            raise NotImplementedError(f"{type(module).__name__} has another forward than its class")


def _check_hooks(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotImplementedError(f"{type(module).__name__} has hooks")
