"""Sampling the student's continuations from shared prefixes.

The one place that knows how a prefix is kept and read: a sequence is prefilled once, whatever the number of its
continuations; each continuation gets a copy of the part of that cache that it needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from odp_callbacks.functional.gradients import forward_arguments

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, what is done of it, and how much there is."""


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of ``S`` sequences, one pair ``(S, H, T, D)`` for each layer; aligned left."""

    layers: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Start:
    """Where a continuation starts.

    Attributes:
        sequence: Which prefilled sequence it continues.
        prefix: How many of that sequence's first tokens it has seen.
        token: The token that follows them: a rollout's last prompt token, or a branch's first token.
        limit: The most tokens to sample after ``token``, at least 1.
    """

    sequence: int
    prefix: int
    token: int
    limit: int


@dataclass(frozen=True)
class Continuation:
    """Sampled tokens, with the end token if one came; ``truncated`` where the limit cut it."""

    tokens: tuple[int, ...]
    truncated: bool


def prefill(model: nn.Module, sequences: Sequence[Tensor]) -> PrefixCache:
    """Run ``model`` once over sequences and keep their keys and values.

    Args:
        model: Causal language model that takes a transformers cache.
        sequences: ``(T_s,)`` int64 each, without padding.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(s) for s in sequences])
    # Right padding: positions count from 0, and what follows a sequence's end is never read.
    ids = pad_sequence([s.cpu() for s in sequences], batch_first=True)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    cache = DynamicCache()
    if ids.shape[1]:
        _forward(model, forward_arguments(model), ids.to(device), mask.to(device), None, cache)
    return PrefixCache([(layer.keys, layer.values) for layer in cache.layers])


def sample_continuations(
    model: nn.Module,
    cache: PrefixCache,
    starts: Sequence[Start],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    generator: torch.Generator | None,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Continuation]:
    """Sample one continuation for each start, from the student's own policy: temperature, and nothing else.

    Args:
        model: The student, in evaluation mode.
        cache: Prefixes, from :func:`prefill`.
        starts: Where each continuation starts.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        generator: Random stream on the model's device; None for torch's global one.
        batch_size: The most continuations at a time.
        progress: Called with the number of finished continuations.

    Returns:
        In the order of ``starts``.
    """
    # Neighbours in length share a batch, so that little of the copied prefix is padding.
    order = sorted(range(len(starts)), key=lambda i: (starts[i].prefix, starts[i].sequence))
    sampled: dict[int, Continuation] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = _sample_batch(model, cache, [starts[i] for i in chosen], temperature, eos_token_ids, generator)
        sampled.update(zip(chosen, batch, strict=True))
        if progress is not None:
            progress(len(sampled))
    return [sampled[i] for i in range(len(starts))]


def _sample_batch(
    model: nn.Module,
    prefixes: PrefixCache,
    starts: Sequence[Start],
    temperature: float,
    eos_token_ids: Sequence[int],
    generator: torch.Generator | None,
) -> list[Continuation]:
    device = next(model.parameters()).device
    seen = torch.tensor([s.prefix for s in starts], device=device)  # (B,)
    limits = torch.tensor([s.limit for s in starts], device=device)
    tokens = torch.tensor([s.token for s in starts], device=device)
    eos = torch.tensor(list(eos_token_ids), device=device, dtype=torch.long)
    cache, mask = _gather(prefixes, torch.tensor([s.sequence for s in starts], device=device), seen)
    written = torch.zeros(len(starts), int(limits.max()), dtype=torch.long, device=device)
    lengths = torch.zeros_like(limits)
    ended = torch.zeros_like(limits, dtype=torch.bool)
    alive = torch.arange(len(starts), device=device)
    takes = forward_arguments(model)  # read once: inspecting a signature has no place in a loop over tokens
    for step in range(written.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        positions = (seen[alive] + step)[:, None]
        logits = _forward(model, takes, tokens[:, None], mask, positions, cache)[:, -1]  # (B, V)
        probabilities = torch.softmax(logits.float() / temperature, dim=-1)
        tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        written[alive, step] = tokens
        lengths[alive] += 1
        ended[alive] = torch.isin(tokens, eos)
        running = ~ended[alive] & (lengths[alive] < limits[alive])
        if not running.any():
            break
        if not running.all():
            # Finished rows leave, so that no step is spent on padding.
            kept = running.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            mask, tokens, alive = mask[kept], tokens[kept], alive[kept]
    return [
        Continuation(tuple(row[:length]), not end)
        for row, length, end in zip(written.tolist(), lengths.tolist(), ended.tolist(), strict=True)
    ]


def _gather(prefixes: PrefixCache, rows: Tensor, lengths: Tensor) -> tuple[DynamicCache, Tensor]:
    """Copy the first ``lengths`` positions of sequences ``rows``, aligned right; return them with their mask (B, T).

    Aligned right, the distance between two positions in the cache is the distance in the text: sliding windows,
    which transformers cut by the former, stay exact.
    """
    longest = int(lengths.max())
    steps = torch.arange(longest, device=rows.device)
    place = steps - (longest - lengths)[:, None]  # (B, T): where in the sequence, negative on padding
    cache = DynamicCache()
    if longest:
        for layer, (keys, values) in enumerate(prefixes.layers):
            at = (rows[:, None], slice(None), place.clamp(min=0))
            cache.update(keys[at].transpose(1, 2), values[at].transpose(1, 2), layer)  # (B, T, H, D) -> (B, H, T, D)
    return cache, (place >= 0).long()


def _forward(
    model: nn.Module,
    takes: frozenset[str],
    ids: Tensor,
    mask: Tensor,
    position_ids: Tensor | None,
    cache: DynamicCache,
) -> Tensor:
    """Logits at the last position ``(B, 1, V)``; ``cache`` grows by ``ids``. ``takes``: the forward's arguments."""
    keywords: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    # transformers 5.2x renamed the argument; both names are served.
    keywords["cache" if "cache" in takes else "past_key_values"] = cache
    if position_ids is not None and "position_ids" in takes:
        keywords["position_ids"] = position_ids
    if "logits_to_keep" in takes:
        keywords["logits_to_keep"] = 1
    logits: Tensor = model(**keywords).logits
    return logits[:, -1:]
