"""Which way a model's continuations are sampled, and the ways for models that cannot share a prefix.

Three ways with one distribution, the first that works is taken: the shared prefix
(:mod:`odp_callbacks.engine.sampling.continuous_batching`); a copy of the prefix's cache for each continuation; transformers' ``generate``
for models with another kind of cache. Which one works is tried, on a few tokens, against the model's full forward.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from odp_callbacks.engine.sampling.attention import model_configs, using_shared_prefix_attention
from odp_callbacks.engine.sampling.categorical import Continuation, check_probabilities, sample_tokens
from odp_callbacks.engine.sampling.continuous_batching import Finished, sample_with_shared_prefix
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.sampling.prefix_cache import (
    ContinuationRequest,
    PrefixCache,
    extend_prefix_cache,
    forward,
    prefill,
    share,
    suffix_cache,
    vocabulary_size,
)
from odp_callbacks.engine.sampling.randomness import as_keys, fresh_keys, uniforms
from odp_callbacks.functional.gradients import forward_arguments

BACKENDS = ("shared prefix", "repeated cache", "generate")

_known: "WeakKeyDictionary[nn.Module, tuple[str, str]]" = WeakKeyDictionary()
_told: "WeakSet[nn.Module]" = WeakSet()


@dataclass(frozen=True)
class PrefilledRollouts:
    """Sequences that continuations start from.

    Attributes:
        sequences: ``(T_s,)`` int64 each.
        cache: Their keys and values; None where ``generate`` keeps its own.
        way: One of :data:`BACKENDS`.
    """

    sequences: tuple[Tensor, ...]
    cache: PrefixCache | None
    way: str


def prefill_rollouts(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor] | None = None,
    owners: Sequence[int] = (),
    way: str | None = None,
) -> PrefilledRollouts:
    """Run ``model`` over sequences: prompts, or prompts with responses, each prompt once.

    Args:
        model: The student, in evaluation mode.
        prompts: ``(P_q,)`` int64 each.
        responses: ``(T_s,)`` int64 each, what follows; None where the prompts are the sequences.
        owners: For each response, its prompt.
        way: One of :data:`BACKENDS`; None for the first that works for this model.
    """
    way = way or _told_way(model)
    if responses is None:
        sequences = list(prompts)
    else:
        sequences = [torch.cat([prompts[q], r]) for q, r in zip(owners, responses, strict=True)]
    cache = None
    if way == "shared prefix":
        cache = prefill(model, prompts)
        if responses is not None:
            cache, _ = extend_prefix_cache(model, cache, responses, owners)
    elif way == "repeated cache":
        cache = prefill(model, sequences)
    return PrefilledRollouts(tuple(sequences), cache, way)


def sample_continuations(
    model: nn.Module,
    prefixes: PrefilledRollouts,
    starts: Sequence[ContinuationRequest],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int] | None = None,
    batch_size: int,
    memory: float | None = None,
    finished: Finished | None = None,
) -> list[Continuation]:
    """Sample one continuation for each start, from the student's own policy: temperature, and nothing else.

    Args:
        model: The student, in evaluation mode.
        prefixes: From :func:`prefill_rollouts`.
        starts: Where each continuation starts.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        keys: Of each continuation; what it draws is a function of its key alone, whoever else is sampled with it.
            None draws them from torch's global stream.
        batch_size: The most continuations at a time; fewer where they would take more memory than there is.
        memory: The most bytes to take; None for half of what is free.
        finished: Told of continuations as they finish, by their place among the starts.

    Returns:
        In the order of ``starts``.

    Raises:
        FloatingPointError: If the model's logits are no distribution (NaN).
    """
    keys = fresh_keys(len(starts)) if keys is None else keys
    if starts and prefixes.cache is not None:
        batch_size = min(batch_size, _seats(prefixes, starts, free_bytes(next(model.parameters()).device, memory)))
    if prefixes.way == "shared prefix":
        assert prefixes.cache is not None
        return sample_with_shared_prefix(
            model,
            prefixes.cache,
            starts,
            temperature=temperature,
            eos_token_ids=eos_token_ids,
            keys=keys,
            batch_size=batch_size,
            finished=finished,
        )
    sampled: dict[int, Continuation] = {}
    for chosen in _batches(starts, batch_size, equal=prefixes.way == "generate"):
        some = [starts[i] for i in chosen]
        if prefixes.cache is not None:
            batch = _repeat(model, prefixes.cache, some, temperature, list(eos_token_ids), [keys[i] for i in chosen])
        else:
            batch = _generate(
                model, prefixes.sequences, some, temperature, list(eos_token_ids), [keys[i] for i in chosen]
            )
        done = dict(zip(chosen, batch, strict=True))
        sampled.update(done)
        if finished is not None:
            finished(done)
    return [sampled[i] for i in range(len(starts))]


def _seats(prefixes: PrefilledRollouts, starts: Sequence[ContinuationRequest], free: int) -> int:
    """How many continuations' keys and values fit."""
    assert prefixes.cache is not None
    token = sum(x.shape[1] * x.shape[3] * x.element_size() for pair in prefixes.cache.trunks for x in pair)
    longest = max(s.limit + (s.prefix if prefixes.way == "repeated cache" else 0) for s in starts)
    return max(1, free // max(1, token * longest))


def _batches(starts: Sequence[ContinuationRequest], batch_size: int, equal: bool) -> Iterator[list[int]]:
    """Neighbours in length share a batch, so that little is padding; ``equal``: of one length, so that none is."""
    order = sorted(range(len(starts)), key=lambda i: (starts[i].prefix, starts[i].sequence))
    batch: list[int] = []
    for i in order:
        if len(batch) == batch_size or (equal and batch and starts[i].prefix != starts[batch[0]].prefix):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _repeat(
    model: nn.Module,
    prefixes: PrefixCache,
    starts: Sequence[ContinuationRequest],
    temperature: float,
    eos: list[int],
    keys: Sequence[int],
) -> list[Continuation]:
    """One batch, each row on a copy of the part of its sequence's cache that it needs."""
    device = next(model.parameters()).device
    seen = torch.tensor([s.prefix for s in starts], device=device)  # (B,)
    limits = torch.tensor([s.limit for s in starts], device=device)
    tokens = torch.tensor([s.token for s in starts], device=device)
    ends = torch.tensor(eos, device=device, dtype=torch.long)
    cache, mask = _gather(prefixes, torch.tensor([s.sequence for s in starts], device=device), seen)
    written = torch.zeros(len(starts), int(limits.max()), dtype=torch.long, device=device)
    lengths = torch.zeros_like(limits)
    ended = torch.zeros_like(limits, dtype=torch.bool)
    alive = torch.arange(len(starts), device=device)
    all_keys = as_keys(keys, device)
    takes = forward_arguments(model)
    for step in range(written.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        positions = (seen[alive] + step)[:, None]
        logits = forward(model, tokens[:, None], cache, mask=mask, positions=positions, takes=takes)[:, -1]  # (B, V)
        draws = uniforms(all_keys[alive], torch.full_like(alive, step), 2)
        tokens, sound = sample_tokens(logits, temperature, draws)
        check_probabilities(sound)
        written[alive, step] = tokens
        lengths[alive] += 1
        ended[alive] = torch.isin(tokens, ends)
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
        for layer, (keys, values) in enumerate(prefixes.trunks):
            at = (rows[:, None], slice(None), place.clamp(min=0))
            cache.update(keys[at].transpose(1, 2), values[at].transpose(1, 2), layer)  # (B, T, H, D) -> (B, H, T, D)
    return cache, (place >= 0).long()


def _generate(
    model: Any,
    sequences: Sequence[Tensor],
    starts: Sequence[ContinuationRequest],
    temperature: float,
    eos: list[int],
    keys: Sequence[int],
) -> list[Continuation]:
    """One batch of equally long prefixes, each run from its first token."""
    device = next(model.parameters()).device
    ids = torch.stack([torch.cat([sequences[s.sequence][: s.prefix], torch.tensor([s.token])]) for s in starts])
    ids = ids.to(device)
    plain = GenerationConfig(
        do_sample=False,  # `_Drawn` leaves it nothing to choose
        max_new_tokens=max(s.limit for s in starts),
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
    )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own, base.generation_config = base.generation_config, plain
    drawn = _Drawn(as_keys(keys, device), ids.shape[1], temperature)
    try:
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=plain,
            logits_processor=LogitsProcessorList([drawn]),
        )[:, ids.shape[1] :].tolist()
    finally:
        base.generation_config = own
    found = []
    for row, start in zip(written, starts, strict=True):
        end = next((t for t, token in enumerate(row[: start.limit]) if token in eos), None)
        found.append(Continuation(tuple(row[: start.limit if end is None else end + 1]), end is None))
    return found


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Makes greedy decoding sample: leaves to each row the token that its key draws."""

    def __init__(self, keys: Tensor, prefix: int, temperature: float) -> None:
        self.keys, self.prefix, self.temperature = keys, prefix, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = torch.full_like(self.keys, input_ids.shape[1] - self.prefix)
        tokens, sound = sample_tokens(scores, self.temperature, uniforms(self.keys, step, 2))
        check_probabilities(sound)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def backend_of(model: nn.Module) -> str:
    """The first of :data:`BACKENDS` that gives this model's own logits; tried once for each model.

    Args:
        model: In evaluation mode.
    """
    if model not in _known:
        reasons = []
        for way, trial in (("shared prefix", _try_shared), ("repeated cache", _try_repeated)):
            try:
                trial(model)
            except torch.OutOfMemoryError:
                raise  # says nothing about the model
            except Exception as error:
                reasons.append(f"{way}: {error or type(error).__name__}")
            else:
                break
        else:
            way = "generate"
        _known[model] = way, "; ".join(reasons)
    return _known[model][0]


def _told_way(model: nn.Module) -> str:
    """The same, and where it is not the first way, said once."""
    way = backend_of(model)
    if way != BACKENDS[0] and model not in _told:
        _told.add(model)
        warnings.warn(
            f"continuations of {type(model).__name__} are sampled by {way}, which is slower and has the same "
            f"distribution; what is faster does not serve this model ({_known[model][1]}).",
            stacklevel=3,
        )
    return way


def _try_shared(model: nn.Module) -> None:
    """Prompts of unequal length, responses, and rows that leave them at unequal places, against the full forward."""
    kinds = {kind for config in model_configs(model) for kind in getattr(config, "layer_types", None) or ()}
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of kind {sorted(other)}")
    device = next(model.parameters()).device
    prompts, responses, owners = _tokens(model, (6, 3)), _tokens(model, (5, 2, 4)), (0, 0, 1)
    starts = [ContinuationRequest(s, len(prompts[owners[s]]) + t, 1, 2) for s, t in ((0, 5), (0, 2), (1, 1), (2, 3))]
    with torch.no_grad():
        tree, logits = extend_prefix_cache(
            model, prefill(model, prompts), responses, owners, keep=[[len(r) - 1] for r in responses]
        )
        wholes = [torch.cat([prompts[q], r]) for q, r in zip(owners, responses, strict=True)]
        for whole, found in zip(wholes, logits, strict=True):
            _agree(model, whole, found[0])
        with using_shared_prefix_attention(model):
            view = share(tree, starts, device, 2)
            cache = suffix_cache(len(starts), 2, view)
            steps = []
            for step in range(2):
                positions = (view.starts + view.ages)[:, None]
                ids = torch.full((len(starts), 1), 1 - step, device=device)
                steps.append(forward(model, ids, cache, positions=positions, view=view)[:, -1])
                view.ages += 1
                view.step(step + 1, True)
        # Windows are longer than this trial: a layer must have asked for its own.
        windows = {getattr(c, "sliding_window", None) for c in model_configs(model)} - {None, 0}
        slides = not kinds or "sliding_attention" in kinds
        if slides and not windows <= view.windows:
            raise NotImplementedError("a sliding window that the attention function is not told of")
    for row, start in enumerate(starts):
        prefix = wholes[start.sequence][: start.prefix]
        for step in range(2):
            _agree(model, torch.cat([prefix, torch.tensor([1, 0][: step + 1])]), steps[step][row])


def _try_repeated(model: nn.Module) -> None:
    """Rows on copies of a cache, aligned right, against the full forward."""
    device = next(model.parameters()).device
    sequences = _tokens(model, (6, 3))
    lengths = torch.tensor([5, 2], device=device)
    with torch.no_grad():
        cache, mask = _gather(prefill(model, sequences), torch.tensor([0, 1], device=device), lengths)
        ids = torch.ones(2, 1, dtype=torch.long, device=device)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        logits = forward(model, ids, cache, mask=mask, positions=lengths[:, None])[:, -1]
    for row, length in enumerate(lengths.tolist()):
        _agree(model, torch.cat([sequences[row][:length], torch.tensor([1])]), logits[row])


def _agree(model: Callable[..., Any], ids: Tensor, logits: Tensor) -> None:
    """Raise unless ``logits`` are those that the full forward gives after ``ids``, up to rounding."""
    with torch.no_grad():
        whole = model(input_ids=ids[None].to(logits.device), use_cache=False).logits[0, -1]
    # Some families take their softmax in float32 whatever the model is in.
    # A trainer (accelerate, say) may give logits in float32 that were computed in half precision.
    mixed = torch.is_autocast_enabled(whole.device.type)
    coarse = 0.1 if mixed else {torch.float64: 1e-5, torch.float32: 1e-3}.get(whole.dtype, 0.1)
    error = float((whole - logits).abs().max() / (1 + whole.abs().max()))
    if not error <= coarse:
        raise ArithmeticError(f"logits differ by {error:.1g} from the full forward's")


def _tokens(model: nn.Module, lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = vocabulary_size(model)
    return [torch.randint(size, (length,), generator=generator) for length in lengths]
