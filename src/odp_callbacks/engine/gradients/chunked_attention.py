"""Attention in chunks of queries, for passes in which the memory-efficient kernels are not defined.

Forward-mode derivatives exist for the plain kernel only. It holds the scores of all pairs of tokens at once, and their
tangents. For a chunk of queries they grow linearly with the length of the sequence.
"""

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**22
"""Scores that are held at a time, at most, for each direction, on a CPU; a single query may have more."""
CHUNK_NUMBERS_ELSEWHERE = 2**25
"""The same on another device that has the memory: it is idle between the operators of small chunks."""
BYTES_OF_SCORE = 512
"""What a score takes in all directions of a pass, by an estimate that leaves room for all else."""


def numbers_at_a_time(device: torch.device, memory: int) -> int:
    """How many scores are held at a time for each direction, at most.

    Args:
        device: Where they are.
        memory: What a pass may use there, in bytes.

    Examples:
        >>> numbers_at_a_time(torch.device("cpu"), 2**40) == CHUNK_NUMBERS
        True
        >>> numbers_at_a_time(torch.device("cuda"), 2**40) == CHUNK_NUMBERS_ELSEWHERE
        True
    """
    if device.type == "cpu":
        return CHUNK_NUMBERS
    return max(CHUNK_NUMBERS, min(CHUNK_NUMBERS_ELSEWHERE, memory // BYTES_OF_SCORE))


def chunked_attention(
    numbers: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What :func:`torch.nn.functional.scaled_dot_product_attention` computes without dropout.

    Args:
        numbers: Scores that are held at a time, at most.
        query: ``(..., A, T, D)``.
        key: ``(..., A', S, D)``.
        value: ``(..., A', S, E)``.
        attn_mask: Bool, True where a query attends, or floating, to be added; broadcastable to ``(..., A, T, S)``.
        dropout_p: Must be 0.
        is_causal: Whether a query attends to keys up to its own place.
        scale: Multiplies the scores; None for ``1 / sqrt(D)``.
        enable_gqa: Whether ``A'`` may divide ``A``.

    Returns:
        ``(..., A, T, E)``.

    Examples:
        >>> query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
        >>> chunked = chunked_attention(10, query, key, value, is_causal=True)
        >>> whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> torch.allclose(chunked, whole, atol=1e-6)
        True
    """
    if dropout_p:
        raise NotImplementedError("attention in chunks has no dropout")
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, dim=-3), value.repeat_interleave(repeats, dim=-3)
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    keys, values = key.to(wide).mT, value.to(wide)
    length, key_count = query.shape[-2], key.shape[-2]
    of_query = max(1, query.shape[:-2].numel() * key_count)
    chunk = max(1, min(length, numbers // of_query))
    parts = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        seen = min(last, key_count) if is_causal else key_count
        scores = (query[..., first:last, :].to(wide) * factor) @ keys[..., :seen]
        if is_causal:
            future = torch.ones(last - first, seen, dtype=torch.bool, device=query.device).triu(first + 1)
            scores = scores.masked_fill(future, -torch.inf)
        if attn_mask is not None:
            rows = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., first:last, :]
            rows = rows[..., :seen]
            scores = scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows.to(wide)
        parts.append((torch.softmax(scores, dim=-1) @ values[..., :seen, :]).to(query.dtype))
    return torch.cat(parts, dim=-2)
