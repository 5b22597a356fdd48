r"""Attention that reads a shared prefix once for all rows that continue it.

The rows of a batch attend to parts that they share (a question's prompt, a rollout's response) and to their own
suffixes. Attention to each part is computed separately, with the log-sum-exp of its scores, and the parts are then
merged exactly:

.. math:: o = \sum_i \frac{e^{\ell_i}}{\sum_j e^{\ell_j}}\, o_i, \qquad \ell_i = \ln \sum_{t \in i} e^{s_t}

The function is registered with transformers' ``AttentionInterface``, so it serves every architecture that attends
through this interface, with grouped-query heads, any position embedding, sliding windows, soft-capping and attention
sinks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.module_attributes import module_attribute
from odp_callbacks.engine.sampling.fused_kernels import fused_attention
from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView

ATTENTION_NAME = "odp_shared_prefix"
"""Name under which transformers knows this attention implementation."""


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prefix: SharedPrefixView,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend to the shared levels and to the rows' own suffixes, with the signature of transformers' interface.

    Args:
        module: The attention module; its ``layer_idx`` selects the shared keys and values.
        query: ``(B, H, T', D)``.
        key: ``(B, H', L, D)``, keys of the rows' own suffixes.
        value: ``(B, H', L, D)``, values of the rows' own suffixes.
        attention_mask: Not used: ``shared_prefix`` says which positions each row sees.
        shared_prefix: The levels that the rows share.
        scaling: Factor of the scores; None for one over the square root of ``D``.
        sliding_window: Positions that a query sees, itself included; None for all.
        softcap: Caps the scores at ``softcap * tanh(score / softcap)``; None for no cap.
        s_aux: ``(H,)``, attention sinks; None for none.
        position_bias: Not supported.

    Returns:
        ``(B, T', H, D)`` in the dtype of ``value``, and None in place of the attention weights.

    Raises:
        NotImplementedError: For a position bias.
    """
    if position_bias is not None:
        raise NotImplementedError("attention with a position bias cannot share a prefix")
    # Under autocast a rotary embedding leaves queries and keys in float32 and values in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    batch_size, query_heads, steps = query.shape[:3]
    key_heads = key.shape[1]
    queries_per_key = query_heads // key_heads
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    window = sliding_window or 0
    if window:
        shared_prefix.windows.add(window)
    # Query heads that share keys and values are stacked along the steps: (B, H', queries_per_key * T', D).
    stacked = query.reshape(batch_size, key_heads, queries_per_key * steps, -1)
    suffix_mask = shared_prefix.suffix_mask(key.shape[2], window, queries_per_key, query)
    parts = [attend(stacked, key, value, scale, suffix_mask, softcap, fused=steps > 1)]
    sorted_stacked = stacked[shared_prefix.order].transpose(0, 1).contiguous()  # (H', B, queries_per_key * T', D)
    layer_index: int = module.layer_idx  # type: ignore[assignment]  # torch types the attributes of modules as Tensor
    shared_prefix.attended_layers.add(layer_index)
    for level_index in range(len(shared_prefix.levels)):
        masks = [
            shared_prefix.level_mask(level_index, group_index, window, queries_per_key, query)
            for group_index in range(len(shared_prefix.levels[level_index].groups))
        ]
        parts.append(_attend_to_level(sorted_stacked, shared_prefix, level_index, layer_index, masks, scale, softcap))
    sink_scores = None
    if s_aux is not None:
        sink_scores = s_aux.reshape(1, key_heads, queries_per_key, 1).expand(1, key_heads, queries_per_key, steps)
        sink_scores = sink_scores.reshape(1, key_heads, -1)
    merged = merge(parts, sink_scores)  # (B, H', queries_per_key * T', D)
    return merged.reshape(batch_size, query_heads, steps, -1).transpose(1, 2).contiguous(), None


def _attend_to_level(
    sorted_query: Tensor,
    view: SharedPrefixView,
    level_index: int,
    layer_index: int,
    masks: Sequence[Tensor | None],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend to one level, group by group.

    Args:
        sorted_query: ``(H, B, N, D)``, rows in the view's order.
        view: What the rows share.
        level_index: Index of the level.
        layer_index: Index of the layer.
        masks: The mask of each of the level's groups.
        scale: Factor of the scores.
        softcap: Caps the scores.

    Returns:
        Output ``(B, H, N, D)`` and log-sum-exp ``(B, H, N)``, with the rows in their original order.
    """
    level = view.levels[level_index]
    keys, values = level.layers[layer_index]
    accumulation_dtype = _accumulation_dtype(sorted_query.dtype)
    output = sorted_query.new_zeros(*sorted_query.shape[:3], values.shape[-1])
    # Rows that read nothing of this level keep the lowest finite score, which gives the level a weight of 0.
    log_sums = torch.full(
        sorted_query.shape[:3],
        torch.finfo(accumulation_dtype).min,
        dtype=accumulation_dtype,
        device=sorted_query.device,
    )
    for group, mask in zip(level.groups, masks, strict=True):
        rows = slice(group.first_row, group.stop_row)
        group_output, group_log_sums = attend(
            sorted_query[:, rows].flatten(1, 2)[None],
            keys[group.sequence, None, :, : group.longest_read],
            values[group.sequence, None, :, : group.longest_read],
            scale,
            mask,
            softcap,
            fused=True,
        )
        row_count = group.stop_row - group.first_row
        output[:, rows] = group_output[0].unflatten(1, (row_count, -1))
        log_sums[:, rows] = group_log_sums[0].unflatten(1, (row_count, -1))
    return output.transpose(0, 1)[view.inverse_order], log_sums.transpose(0, 1)[view.inverse_order]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute scaled dot product attention to one part, and the log-sum-exp of its scores.

    Args:
        query: ``(G, H, N, D)``.
        key: ``(G, H, T, D)``.
        value: ``(G, H, T, D')``.
        scale: Factor of the scores.
        mask: Added to the scores; broadcasts to ``(G, H, N, T)``.
        softcap: Caps the scores before the mask is added; None for no cap.
        fused: Whether torch's fused kernel may be used where there is one. It is faster for many queries per group.

    Returns:
        ``(G, H, N, D')`` in the dtype of ``value``, and ``(G, H, N)`` in float32, or float64 for a float64 query.

    Examples:
        >>> import torch
        >>> query, key = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
        >>> output, log_sums = attend(query, key, torch.arange(8.0).view(1, 1, 4, 2), 1.0)
        >>> output.tolist(), round(float(log_sums.exp()), 4)
        ([[[[3.0, 4.0]]]], 4.0)
    """
    accumulation_dtype = _accumulation_dtype(query.dtype)
    if fused and softcap is None and (of_kernel := fused_attention(query, key, value, scale, mask)) is not None:
        output, log_sums = of_kernel
        return output, log_sums if log_sums.dtype == accumulation_dtype else log_sums.to(accumulation_dtype)
    scores = torch.matmul(query * scale, key.mT).to(accumulation_dtype)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask.to(accumulation_dtype)
    highest_scores = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(highest_scores).exp_()
    weight_sums = weights.sum(dim=-1, keepdim=True)
    output = torch.matmul(weights.to(value.dtype), value) / weight_sums.to(value.dtype)
    return output, (highest_scores + weight_sums.log()).squeeze(-1)


def merge(parts: Sequence[tuple[Tensor, Tensor]], sink_scores: Tensor | None = None) -> Tensor:
    """Merge attention to each part into attention to all parts together.

    Args:
        parts: Outputs ``(…, N, D)`` and log-sum-exps ``(…, N)`` of :func:`attend`.
        sink_scores: ``(…, N)``, scores of a sink that takes attention and contributes no value; None for no sink.

    Returns:
        ``(…, N, D)``.

    Examples:
        >>> import torch
        >>> query, key, value = (torch.randn(1, 1, length, 2) for length in (3, 5, 5))
        >>> whole, _ = attend(query, key, value, 1.0)
        >>> slices = slice(0, 2), slice(2, 5)
        >>> parts = [attend(query, key[:, :, part], value[:, :, part], 1.0) for part in slices]
        >>> torch.allclose(merge(parts), whole, atol=1e-6)
        True
    """
    if len(parts) == 1 and sink_scores is None:
        return parts[0][0]
    log_sums = [part_log_sums for _, part_log_sums in parts]
    if sink_scores is not None:
        log_sums.append(sink_scores.to(log_sums[0]).expand_as(log_sums[0]))
    weights = torch.softmax(torch.stack(log_sums), dim=0)  # (I, …, N)
    merged = parts[0][0] * weights[0, ..., None].to(parts[0][0])
    for (output, _), weight in zip(parts[1:], weights[1:], strict=False):
        merged += output * weight[..., None].to(output)
    return merged


def model_configs(model: nn.Module) -> list[Any]:
    """Collect the configurations that modules of ``model`` read; for a model with several parts, also its text's."""
    configs: dict[int, Any] = {}
    found = (module_attribute(module, "config") for module in model.modules())
    for config in (config for config in found if config is not None):
        for part in (config, getattr(config, "get_text_config", lambda config=config: config)()):
            configs[id(part)] = part
    return list(configs.values())


class AttentionSwitch:
    """Lets a model attend through another function for a while, as often as that is needed.

    Args:
        model: The model; its configurations are looked up once, because that takes long for a model of many modules.
        name: Under which transformers knows the function.
        attention: The function.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = ATTENTION_NAME,
        attention: Callable[..., tuple[Tensor, None]] = shared_prefix_attention,
    ) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(name, attention)
        self.name = name
        self._configs = [config for config in model_configs(model) if hasattr(config, "_attn_implementation_internal")]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Attend through the function inside the context; the model's own implementation is restored afterwards."""
        implementations = [config._attn_implementation_internal for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation_internal = self.name
            yield
        finally:
            for config, implementation in zip(self._configs, implementations, strict=True):
                config._attn_implementation_internal = implementation


@contextmanager
def using_shared_prefix_attention(model: nn.Module) -> Iterator[None]:
    """Let ``model`` attend through :func:`shared_prefix_attention`, and restore its own implementation afterwards."""
    with AttentionSwitch(model).on():
        yield


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
