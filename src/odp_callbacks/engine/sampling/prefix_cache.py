"""PrefilledRollouts that many sequences share: each question's prompt once, each rollout's response once.

A tree of keys and values. Its trunks are the prompts; its limbs are what rollouts add to them. A branch of a rollout
reads the whole of its question's trunk, the limb up to its node, and its own suffix
(:mod:`odp_callbacks.engine.sampling.attention`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from odp_callbacks.engine.sampling.attention import Layers, Level, SharedPrefix, using_shared_prefix_attention
from odp_callbacks.functional.gradients import call_with, forward_arguments

MOST_TOKENS = 8192
"""Tokens of responses that go through the model at a time."""


@dataclass(frozen=True)
class ContinuationRequest:
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
class PrefixCache:
    """Keys and values of ``S`` sequences, a tree of two levels.

    Attributes:
        trunks: Of each of ``Q`` prompts, ``(Q, H, T, D)`` in each layer; aligned left.
        trunk_lengths: Of each prompt.
        limbs: Of what each sequence adds to its prompt, ``(S, H, T', D)``; empty where the prompts are all.
        limb_lengths: Of each, 0 for every prompt where the prompts are all.
        owners: For each sequence, its trunk.
    """

    trunks: Layers
    trunk_lengths: tuple[int, ...]
    limbs: Layers
    limb_lengths: tuple[int, ...]
    owners: tuple[int, ...]


def prefill(model: nn.Module, sequences: Sequence[Tensor], parameters: dict[str, Tensor] | None = None) -> PrefixCache:
    """Run ``model`` once over sequences and keep their keys and values.

    Args:
        model: Causal language model that takes a transformers cache.
        sequences: ``(T_s,)`` int64 each, without padding.
        parameters: Replacements for parameters of ``model``.
    """
    device = next(model.parameters()).device
    lengths = [len(s) for s in sequences]
    # Right padding: positions count from 0, and what follows a sequence's end is never read.
    ids = pad_sequence([s.cpu() for s in sequences], batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    cache = DynamicCache()
    if ids.shape[1]:
        forward(model, ids.to(device), cache, mask=mask.to(device), parameters=parameters)
    layers = [(layer.keys.to(layer.values.dtype), layer.values) for layer in cache.layers]
    return PrefixCache(layers, tuple(lengths), [], (0,) * len(lengths), tuple(range(len(lengths))))


def extend_prefix_cache(
    model: nn.Module,
    trunks: PrefixCache,
    responses: Sequence[Tensor],
    owners: Sequence[int],
    keep: Sequence[Sequence[int]] | None = None,
    parameters: dict[str, Tensor] | None = None,
    most_logits: int = 2**26,
) -> tuple[PrefixCache, list[Tensor]]:
    """Add responses to their prompts: one forward over the responses alone.

    Args:
        model: The model that prefilled the trunks.
        trunks: From :func:`prefill`.
        responses: ``(T_s,)`` int64 each, what follows the prompt.
        owners: Their trunks.
        keep: For each response, the places in it whose logits are wanted; None for no logits.
        parameters: Replacements for parameters of ``model``.
        most_logits: The most logits to hold at a time.

    Returns:
        The tree, and ``(N_s, V)`` logits for each response.
    """
    device = next(model.parameters()).device
    lengths = [len(s) for s in responses]
    tree = PrefixCache(trunks.trunks, trunks.trunk_lengths, [], tuple(lengths), tuple(owners))
    limbs: Layers = []
    found: list[Tensor] = []
    with using_shared_prefix_attention(model):
        for first, stop in _chunks(lengths, owners, keep, vocabulary_size(model), most_logits):
            ids = pad_sequence([s.cpu() for s in responses[first:stop]], batch_first=True).to(device)
            starts = [ContinuationRequest(s, trunks.trunk_lengths[owners[s]], 0, 1) for s in range(first, stop)]
            view = share(tree, starts, device, longest=ids.shape[1])
            cache = suffix_cache(len(ids), ids.shape[1], view)
            positions = view.starts[:, None] + torch.arange(ids.shape[1], device=device)
            wanted = sorted({p for row in (keep or [])[first:stop] for p in row})
            at = torch.tensor(wanted, device=device) if wanted else None
            logits = forward(model, ids, cache, positions=positions, view=view, keep=at, parameters=parameters)
            if keep is not None:
                place = {p: i for i, p in enumerate(wanted)}
                found += [logits[row, [place[p] for p in ps]].clone() for row, ps in enumerate(keep[first:stop])]
            if not limbs:
                rows, size = len(responses), max(lengths)
                shapes = [(layer.values, (rows, layer.values.shape[1], size, -1)) for layer in cache.layers]
                limbs = [
                    (v.new_zeros(*shape[:3], layer.keys.shape[3]), v.new_zeros(*shape[:3], v.shape[3]))
                    for (v, shape), layer in zip(shapes, cache.layers, strict=True)
                ]
            for (keys, values), layer in zip(limbs, cache.layers, strict=True):
                keys[first:stop, :, : ids.shape[1]] = layer.keys
                values[first:stop, :, : ids.shape[1]] = layer.values
    return PrefixCache(trunks.trunks, trunks.trunk_lengths, limbs, tuple(lengths), tuple(owners)), found


def share(
    cache: PrefixCache, starts: Sequence[ContinuationRequest], device: torch.device, longest: int
) -> SharedPrefix:
    """What rows that start there share, before the first token of their own.

    Args:
        cache: The tree.
        starts: One for each row.
        device: Where the model is.
        longest: The most tokens that a row's suffix will have.
    """
    of = [cache.owners[s.sequence] for s in starts]
    base = [cache.trunk_lengths[q] for q in of]
    order = sorted(range(len(starts)), key=lambda i: (of[i], starts[i].sequence, starts[i].prefix))
    levels = []
    if cache.trunks:
        reads = [min(starts[i].prefix, base[i]) for i in order]
        levels.append(_level(cache.trunks, [of[i] for i in order], reads, [0] * len(order), device))
    if cache.limbs:
        reads = [max(0, starts[i].prefix - base[i]) for i in order]
        levels.append(_level(cache.limbs, [starts[i].sequence for i in order], reads, [base[i] for i in order], device))
    rows = torch.tensor(order, device=device)
    return SharedPrefix(
        levels=[level for level in levels if level.groups],
        order=rows,
        inverse=torch.argsort(rows),
        starts=torch.tensor([s.prefix for s in starts], device=device),
        ages=torch.zeros(len(starts), dtype=torch.long, device=device),
        oldest=0,
        even=True,
        furthest=max(s.prefix for s in starts) + longest,
    )


def _level(
    layers: Layers, sequences: Sequence[int], reads: Sequence[int], offsets: Sequence[int], device: torch.device
) -> Level:
    groups, ragged = [], []
    first = 0
    for row in range(1, len(sequences) + 1):
        if row < len(sequences) and sequences[row] == sequences[first]:
            continue
        several = reads[first:row]
        if max(several):
            groups.append((sequences[first], first, row, max(several)))
            ragged.append(min(several) < max(several))
        first = row
    return Level(layers, groups, torch.tensor(reads, device=device), torch.tensor(offsets, device=device), ragged)


def suffix_cache(rows: int, length: int, view: SharedPrefix) -> Cache:
    """Room for ``length`` tokens of each row's own; a forward writes each row's at its age in ``view``."""
    return Cache(layer_class_to_replicate=partial(_Suffix, rows, length, view))


class _Suffix(CacheLayerMixin):  # type: ignore[misc]  # untyped in transformers
    """One layer's keys and values of the rows' own tokens, ``(B, H, L, D)``, allocated once."""

    def __init__(self, rows: int, length: int, view: SharedPrefix) -> None:
        super().__init__()
        self.rows, self.length, self.view = rows, length, view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: what a mask hides has a weight of 0, and 0 times a stray NaN is NaN.
        self.keys, self.values = (
            x.new_zeros(self.rows, x.shape[1], self.length, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        steps = key_states.shape[2]
        if steps == self.length:  # a whole response at once
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if self.view.even:
                kept[:, :, self.view.oldest] = new[:, :, 0]
            else:
                kept[torch.arange(len(kept), device=kept.device), :, self.view.ages] = new[:, :, 0]
        end = self.view.oldest + 1
        return self.keys[:, :, :end], self.values[:, :, :end]

    def retain(self, rows: Tensor) -> None:
        """Move the given rows to the front, in their order, and forget the others."""
        for name in ("keys", "values"):
            kept = getattr(self, name)
            kept[: len(rows)] = kept[rows]
            setattr(self, name, kept[: len(rows)])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view.oldest + query_length, 0

    def get_seq_length(self) -> int:
        return self.view.oldest

    def get_max_length(self) -> int:
        return self.length


def forward(
    model: nn.Module,
    ids: Tensor,
    cache: Cache,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    view: SharedPrefix | None = None,
    keep: Tensor | None = None,
    parameters: dict[str, Tensor] | None = None,
    takes: frozenset[str] | None = None,
) -> Tensor:
    """Logits of ``model``, at the last position or at places ``keep``; ``cache`` grows by ``ids``.

    Args:
        model: The model.
        ids: ``(B, T)``.
        cache: Its keys and values.
        mask: ``(B, T + past)``.
        positions: ``(B, T)``.
        view: What the rows share.
        keep: ``(N,)``; None for the last position.
        parameters: Replacements for parameters of ``model``.
        takes: Arguments of the model's forward, where they have been looked up already.

    Returns:
        ``(B, N, V)``.
    """
    takes = forward_arguments(model) if takes is None else takes
    keywords: dict[str, Any] = {"input_ids": ids, "use_cache": True}
    # transformers 5.2x renamed the argument; both names are served.
    keywords["cache" if "cache" in takes else "past_key_values"] = cache
    if mask is not None:
        keywords["attention_mask"] = mask
    if positions is not None and "position_ids" in takes:
        keywords["position_ids"] = positions
    if view is not None:
        keywords["shared_prefix"] = view
    cut = "logits_to_keep" in takes
    if cut:
        keywords["logits_to_keep"] = 1 if keep is None else keep
    output = call_with(model, parameters, keywords)
    logits: Tensor = output.logits
    if keep is not None:
        return logits if cut else logits[:, keep]
    return logits[:, -1:]


def _chunks(
    lengths: Sequence[int],
    owners: Sequence[int],
    keep: Sequence[Sequence[int]] | None,
    vocabulary: int,
    most_logits: int,
) -> list[tuple[int, int]]:
    """Consecutive runs of responses, small enough for their logits and activations."""
    found, first = [], 0
    union: set[int] = set()
    for row in range(len(lengths)):
        wider = union | set(keep[row] if keep is not None else ())
        rows = row - first + 1
        if rows > 1 and (
            rows * len(wider) * vocabulary > most_logits or rows * max(lengths[first : row + 1]) > MOST_TOKENS
        ):
            found.append((first, row))
            first, wider = row, set(keep[row] if keep is not None else ())
        union = wider
    if lengths:
        found.append((first, len(lengths)))
    return found


def vocabulary_size(model: nn.Module) -> int:
    """Number of logits that ``model`` gives."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(output, "weight", None)
    config: Any = getattr(model, "config", None)
    return int(weight.shape[0]) if weight is not None else int(config.get_text_config().vocab_size)
