r"""Attention that reads a shared prefix once for all sequences that continue it.

A batch of continuations attends to parts that it shares (a question's prompt, a rollout's response) and to each row's
own suffix. Each part is attended by itself, with its log-sum-exp, and the parts are then merged exactly:

.. math:: o = \sum_i \frac{e^{\ell_i}}{\sum_j e^{\ell_j}}\, o_i, \qquad \ell_i = \ln \sum_{t \in i} e^{s_t}

Registered through transformers' ``AttentionInterface``, so every architecture that attends through it is served:
grouped-query heads, any position embedding, sliding windows, soft-capping and attention sinks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "odp_shared_prefix"
"""Of the attention implementation, as transformers knows it."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``(S, H, T, D)``."""


@dataclass(frozen=True)
class Level:
    """Sequences that rows of a batch share, of one kind: all prompts, or all responses.

    Attributes:
        layers: Their keys and values, ``(S, H, T, D)`` in each layer.
        groups: ``(sequence, first, stop, longest)``: rows ``first`` to ``stop``, in the view's order, read sequence
            ``sequence``, at most ``longest`` positions of it.
        lengths: ``(B,)`` in the view's order, how many positions of its sequence a row reads.
        offsets: ``(B,)`` in the view's order, where in its text the sequence starts.
        ragged: For each group, whether its rows read unequally far.
    """

    layers: Layers
    groups: list[tuple[int, int, int, int]]
    lengths: Tensor
    offsets: Tensor
    ragged: list[bool]


@dataclass
class SharedPrefix:
    """What one forward sees: the levels that its ``B`` rows share, and how far each row's own suffix is.

    Attributes:
        levels: From the root.
        order: ``(B,)``, rows sorted so that those that share a sequence are neighbours.
        inverse: ``(B,)``, undoes it.
        starts: ``(B,)``, the position at which a row's own suffix starts.
        ages: ``(B,)``, tokens in a row's suffix before this forward.
        oldest: The largest of ``ages``.
        even: Whether ``ages`` are all equal.
        furthest: No position is beyond this one.
        windows: Sliding windows that layers asked for, to see that none was forgotten.
    """

    levels: list[Level]
    order: Tensor
    inverse: Tensor
    starts: Tensor
    ages: Tensor
    oldest: int
    even: bool
    furthest: int
    windows: set[int] = field(default_factory=set)
    _masks: dict[tuple[int, ...], Tensor | None] = field(default_factory=dict)

    def step(self, oldest: int, even: bool) -> None:
        """One token further; ``ages`` has been counted up in place."""
        self.oldest, self.even = oldest, even
        # Masks of levels hold while rows stay, except those that a window cuts.
        self._masks = {key: mask for key, mask in self._masks.items() if key[0] >= 0 and key[2] == 0}

    def level_mask(self, depth: int, group: int, window: int, heads: int, query: Tensor) -> Tensor | None:
        """Additive ``(1, 1, n * heads * T', T)`` for one group of a level, or None where everything is seen."""
        level = self.levels[depth]
        cut = window if 0 < window <= self.furthest else 0
        if not cut and not level.ragged[group]:
            return None
        key = (depth, group, cut, heads)
        if key not in self._masks:
            _, first, stop, longest = level.groups[group]
            at = torch.arange(longest, device=query.device)
            seen = at < level.lengths[first:stop, None, None]  # (n, 1, T)
            if cut:
                rows = self.order[first:stop]
                now = (self.starts + self.ages)[rows, None] + torch.arange(query.shape[2], device=query.device)
                seen = seen & (level.offsets[first:stop, None, None] + at > now[..., None] - cut)  # (n, T', T)
            tall = seen[:, None].expand(-1, heads, query.shape[2], -1).reshape(1, 1, -1, longest)
            self._masks[key] = _additive(tall, query)
        return self._masks[key]

    def suffix_mask(self, length: int, window: int, heads: int, query: Tensor) -> Tensor | None:
        """Additive ``(B or 1, 1, heads * T', L)`` for the rows' own suffixes, or None where everything is seen."""
        cut = window if 0 < window < length else 0
        if self.even and query.shape[2] == 1 and not cut:
            return None
        key = (-1, length, cut, heads)
        if key not in self._masks:
            at = torch.arange(length, device=query.device)
            ages = at[self.oldest : self.oldest + 1] if self.even else self.ages
            now = ages[:, None] + torch.arange(query.shape[2], device=query.device)  # (B or 1, T')
            seen = at <= now[..., None]
            if cut:
                seen = seen & (at > now[..., None] - cut)
            tall = seen[:, None].expand(-1, heads, -1, -1).reshape(len(ages), 1, -1, length)
            self._masks[key] = _additive(tall, query)
        return self._masks[key]


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prefix: SharedPrefix,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend to the shared levels and to the rows' own suffixes, by transformers' attention interface.

    Args:
        module: The attention module; its ``layer_idx`` says whose keys and values to read.
        query: ``(B, H, T', D)``.
        key: ``(B, H', L, D)``, the rows' own suffixes up to now.
        value: ``(B, H', L, D)``.
        attention_mask: Not used: ``shared_prefix`` knows who sees what.
        shared_prefix: What the rows share.
        scaling: Of the scores; one over the root of ``D`` by default.
        sliding_window: Positions that a query sees, itself included; None for all.
        softcap: Scores go through ``softcap * tanh(score / softcap)``.
        s_aux: ``(H,)``, attention sinks.
        position_bias: Not supported.

    Returns:
        ``(B, T', H, D)``, and None for the weights.

    Raises:
        NotImplementedError: For a position bias.
    """
    if position_bias is not None:
        raise NotImplementedError("a position bias in attention")
    # Under autocast a rotation leaves queries and keys in float32, and values in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    batch, all_heads, steps = query.shape[:3]
    heads = key.shape[1]
    share = all_heads // heads
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    window = sliding_window or 0
    if window:
        shared_prefix.windows.add(window)
    layer: int = module.layer_idx  # type: ignore[assignment]  # torch declares modules' attributes so
    # Queries of the heads that share keys and values stand in line: (B, H', share * T', D).
    q = query.reshape(batch, heads, share * steps, -1)
    own_mask = shared_prefix.suffix_mask(key.shape[2], window, share, query)
    parts = [attend(q, key, value, scale, own_mask, softcap, fused=steps > 1)]
    sorted_q = q[shared_prefix.order].transpose(0, 1).contiguous()  # (H', B, share * T', D)
    for depth, level in enumerate(shared_prefix.levels):
        keys, values = level.layers[layer]
        out = q.new_zeros(*sorted_q.shape[:3], values.shape[-1])
        total = parts[0][1].new_full(sorted_q.shape[:3], _lowest(parts[0][1].dtype))
        for group, (sequence, first, stop, longest) in enumerate(level.groups):
            mask = shared_prefix.level_mask(depth, group, window, share, query)
            found, sums = attend(
                sorted_q[:, first:stop].flatten(1, 2)[None],
                keys[sequence, None, :, :longest],
                values[sequence, None, :, :longest],
                scale,
                mask,
                softcap,
                fused=True,
            )
            out[:, first:stop] = found[0].unflatten(1, (stop - first, -1))
            total[:, first:stop] = sums[0].unflatten(1, (stop - first, -1))
        parts.append((out.transpose(0, 1)[shared_prefix.inverse], total.transpose(0, 1)[shared_prefix.inverse]))
    sink = None
    if s_aux is not None:
        sink = s_aux.reshape(1, heads, share, 1).expand(1, heads, share, steps).reshape(1, heads, -1)
    merged = merge(parts, sink)  # (B, H', share * T', D)
    return merged.reshape(batch, all_heads, steps, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_prefix_attention)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scaled dot product attention to one part, with the log-sum-exp of its scores.

    Args:
        query: ``(G, H, N, D)``.
        key: ``(G, H, T, D)``.
        value: ``(G, H, T, D')``.
        scale: Of the scores.
        mask: Added to the scores; broadcasts to ``(G, H, N, T)``.
        softcap: Caps the scores before the mask.
        fused: Whether torch's fused kernel may be used where there is one; it pays for many queries a group.

    Returns:
        ``(G, H, N, D')`` in the dtype of ``value``, and ``(G, H, N)`` float32, float64 for float64.

    Examples:
        >>> import torch
        >>> q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2), torch.arange(8.0).view(1, 1, 4, 2)
        >>> out, total = attend(q, k, v, 1.0)
        >>> out.tolist(), round(float(total.exp()), 4)
        ([[[[3.0, 4.0]]]], 4.0)
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if fused and softcap is None and query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        if mask is not None:
            mask = mask.expand(len(query), -1, -1, -1)
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        return out, total.to(wide)
    scores = torch.matmul(query * scale, key.mT).to(wide)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask.to(wide)
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    sums = weights.sum(dim=-1, keepdim=True)
    out = torch.matmul(weights.to(value.dtype), value) / sums.to(value.dtype)
    return out, (top + sums.log()).squeeze(-1)


def merge(parts: Sequence[tuple[Tensor, Tensor]], sink: Tensor | None = None) -> Tensor:
    """Attention to all parts together, from attention to each.

    Args:
        parts: Outputs ``(…, N, D)`` and log-sum-exps ``(…, N)`` of :func:`attend`.
        sink: ``(…, N)``, a score that takes attention and gives nothing.

    Returns:
        ``(…, N, D)``.

    Examples:
        >>> import torch
        >>> k, v = torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5, 2)
        >>> q = torch.randn(1, 1, 3, 2)
        >>> whole, _ = attend(q, k, v, 1.0)
        >>> halves = [attend(q, k[:, :, s], v[:, :, s], 1.0) for s in (slice(0, 2), slice(2, 5))]
        >>> torch.allclose(merge(halves), whole, atol=1e-6)
        True
    """
    if len(parts) == 1 and sink is None:
        return parts[0][0]
    totals = [total for _, total in parts]
    every = torch.stack(totals if sink is None else [*totals, sink.to(totals[0]).expand_as(totals[0])])
    shares = torch.softmax(every, dim=0)  # (I, …, N)
    out = parts[0][0] * shares[0, ..., None].to(parts[0][0])
    for (more, _), share in zip(parts[1:], shares[1:], strict=False):
        out += more * share[..., None].to(more)
    return out


def model_configs(model: nn.Module) -> list[Any]:
    """Every configuration that a module of ``model`` reads, and of one with several parts that of its text."""
    found: dict[int, Any] = {}
    for config in (module.config for module in model.modules() if hasattr(module, "config")):
        for part in (config, getattr(config, "get_text_config", lambda c=config: c)()):
            found[id(part)] = part
    return list(found.values())


@contextmanager
def using_shared_prefix_attention(model: nn.Module) -> Iterator[None]:
    """Let ``model`` attend through :func:`shared_prefix_attention`, and afterwards as it did."""
    held = [
        (config, config._attn_implementation_internal)
        for config in model_configs(model)
        if hasattr(config, "_attn_implementation_internal")
    ]
    try:
        for config, _ in held:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, before in held:
            config._attn_implementation_internal = before


def _lowest(dtype: torch.dtype) -> float:
    # Finite: a row that sees nothing of a part must get a weight of 0 there, not NaN.
    return torch.finfo(dtype).min


def _additive(seen: Tensor, query: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=query.dtype, device=seen.device).masked_fill_(~seen, _lowest(query.dtype))
