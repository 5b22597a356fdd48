"""Sample continuations with the backend that works for the model.

There are four backends with the same distribution: the shared prefix
(:mod:`~odp_callbacks.engine.sampling.continuous_batching`), a copy of the prefix's cache for each continuation
(:mod:`~odp_callbacks.engine.sampling.repeated_cache`), transformers' ``generate``
(:mod:`~odp_callbacks.engine.sampling.generate`), and a forward pass over all tokens for each new one
(:mod:`~odp_callbacks.engine.sampling.full_forward`).

Where a model's logits depend on the total length, sequences that stay on one side of the change still share their
prefixes; only the others are sampled by full forward passes.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.backend_selection import BACKENDS, FULL_FORWARD, SELECTION
from odp_callbacks.engine.sampling.continuous_batching import sample_with_shared_prefix
from odp_callbacks.engine.sampling.full_forward import sample_with_full_forward
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache, extend_prefix_cache, prefill
from odp_callbacks.engine.sampling.randomness import fresh_keys
from odp_callbacks.engine.sampling.repeated_cache import sample_with_repeated_cache
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, FinishedCallback

CACHED_BACKENDS = BACKENDS[:2]
"""The backends that read the keys and values of :class:`PrefilledRollouts`."""


@dataclass(frozen=True)
class PrefilledRollouts:
    """Sequences that continuations start from.

    Attributes:
        sequences: ``(T_s,)`` int64 each.
        cache: Their keys and values; None where the backend keeps its own.
        backend: One of :data:`~odp_callbacks.engine.sampling.backend_selection.BACKENDS`.
        uncached: Indices of the sequences whose continuations are sampled by full forward passes.
        lengths: The smallest and the largest number of tokens for which the backend was chosen; None if it was given.
    """

    sequences: tuple[Tensor, ...]
    cache: PrefixCache | None
    backend: str
    uncached: frozenset[int] = frozenset()
    lengths: tuple[int, int] | None = None

    def needs_full_forward(self, model: nn.Module, request: ContinuationRequest) -> bool:
        """Whether a continuation of ``model`` is sampled by full forward passes, whatever the backend of the others."""
        if request.sequence in self.uncached:
            return True
        if self.lengths is None:
            return False
        shortest, longest = self.lengths
        total = request.prefix_length + request.max_new_tokens
        return total > longest and SELECTION.verdict(model, shortest, total).backend != self.backend


def prefill_rollouts(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor] | None = None,
    prompt_of_response: Sequence[int] = (),
    backend: str | None = None,
    max_new_tokens: int = 1,
) -> PrefilledRollouts:
    """Run ``model`` over prompts, or over prompts with responses, and keep the keys and values.

    With the shared prefix each prompt is run once, whatever the number of its responses. The first time that a model
    needs a slower backend, a warning is logged.

    Args:
        model: The student, in evaluation mode.
        prompts: ``(P_q,)`` int64 each.
        responses: ``(T_s,)`` int64 each, the tokens after the prompt; None where the sequences are the prompts.
        prompt_of_response: For each response, the index of its prompt.
        backend: One of :data:`~odp_callbacks.engine.sampling.backend_selection.BACKENDS`; None for the first that
            works for this model at the lengths of the continuations.
        max_new_tokens: The largest number of tokens that will follow a prompt and one more token.
    """
    if responses is None:
        prompt_of_response = range(len(prompts))
        sequences = list(prompts)
    else:
        sequences = [
            torch.cat([prompts[prompt], response])
            for prompt, response in zip(prompt_of_response, responses, strict=True)
        ]
    uncached: frozenset[int] = frozenset()
    lengths = None
    if backend is None and sequences:
        starts = [len(prompts[prompt]) for prompt in prompt_of_response]
        ends = [
            max(len(sequence), start + max_new_tokens) + 1 for start, sequence in zip(starts, sequences, strict=True)
        ]
        backend, uncached, lengths = _choose_backend(model, starts, ends)
    cached_prompts, cached_responses = list(prompts), None if responses is None else list(responses)
    for index in uncached:
        # Beside a sequence of another length, its keys would spoil those of others. Its place is kept.
        cached_prompts[prompt_of_response[index]] = sequences[index][:0]
        if cached_responses is not None:
            cached_responses[index] = sequences[index][:1]
    cache = None
    if backend in ("shared prefix", None) and sequences:
        cache = prefill(model, cached_prompts)
        if cached_responses is not None:
            cache, _ = extend_prefix_cache(model, cache, cached_responses, prompt_of_response)
    elif backend == "repeated cache":
        cache = prefill(model, [s[:0] if index in uncached else s for index, s in enumerate(sequences)])
    return PrefilledRollouts(tuple(sequences), cache, backend or BACKENDS[0], uncached, lengths)


def _choose_backend(
    model: nn.Module, starts: Sequence[int], ends: Sequence[int]
) -> tuple[str, frozenset[int], tuple[int, int]]:
    """Choose a backend for as many sequences as possible, the shorter ones first.

    Args:
        model: The student, in evaluation mode.
        starts: The smallest number of tokens in a forward pass for each sequence.
        ends: The largest.

    Returns:
        The backend, the sequences that it does not serve, and the lengths for which it was chosen.
    """
    limits = sorted(set(ends))

    def served(limit: int) -> tuple[int, int]:
        return min(start for start, end in zip(starts, ends, strict=True) if end <= limit), limit

    verdict = SELECTION.verdict(model, *served(limits[-1]))
    SELECTION.warn_of(model, verdict)
    if verdict.independent:
        return verdict.backend, frozenset(), served(limits[-1])
    # Limits up to a length that depends on the model serve; it lies where the bisection ends.
    served_count = bisect_left(
        range(len(limits)), True, key=lambda index: not SELECTION.verdict(model, *served(limits[index])).independent
    )
    if served_count == 0:
        return FULL_FORWARD, frozenset(range(len(ends))), served(limits[-1])
    lengths = served(limits[served_count - 1])
    uncached = frozenset(index for index, end in enumerate(ends) if end > lengths[1])
    return SELECTION.verdict(model, *lengths).backend, uncached, lengths


def sample_continuations(
    model: nn.Module,
    prefixes: PrefilledRollouts,
    requests: Sequence[ContinuationRequest],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int] | None = None,
    batch_size: int,
    max_memory_bytes: float | None = None,
    on_finished: FinishedCallback | None = None,
) -> list[Continuation]:
    """Sample one continuation for each request from the student's own policy, with a temperature and no other change.

    Args:
        model: The student, in evaluation mode.
        prefixes: From :func:`prefill_rollouts`.
        requests: Where each continuation starts.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        keys: One for each request; the tokens of a continuation depend on its own key, and not on what else is
            sampled. None draws them from torch's global stream.
        batch_size: The largest number of continuations at a time; it is reduced where they would not fit in memory.
        max_memory_bytes: The largest number of bytes to use; None for half of what is free.
        on_finished: Called with continuations as they finish; None for no call.

    Returns:
        Continuations in the order of ``requests``.

    Raises:
        FloatingPointError: If the model's logits do not define a distribution (NaN).
    """
    keys = fresh_keys(len(requests)) if keys is None else keys
    cached: list[int] = []
    uncached: list[int] = []
    for index, request in enumerate(requests):
        (uncached if prefixes.needs_full_forward(model, request) else cached).append(index)
    sampled: dict[int, Continuation] = {}
    for indices, backend in ((cached, prefixes.backend), (uncached, FULL_FORWARD)):

        def report(finished: dict[int, Continuation], indices: list[int] = indices) -> None:
            by_index = {indices[place]: continuation for place, continuation in finished.items()}
            sampled.update(by_index)
            if on_finished is not None:
                on_finished(by_index)

        if indices:
            _sample_with_backend(
                model,
                replace(prefixes, backend=backend),
                [requests[index] for index in indices],
                temperature=temperature,
                eos_token_ids=eos_token_ids,
                keys=[keys[index] for index in indices],
                batch_size=batch_size,
                max_memory_bytes=max_memory_bytes,
                on_finished=report,
            )
    return [sampled[index] for index in range(len(requests))]


def _sample_with_backend(
    model: nn.Module,
    prefixes: PrefilledRollouts,
    requests: Sequence[ContinuationRequest],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int],
    batch_size: int,
    max_memory_bytes: float | None,
    on_finished: FinishedCallback,
) -> None:
    """Sample all requests with one backend; the arguments are those of :func:`sample_continuations`."""
    if prefixes.cache is not None and prefixes.backend in CACHED_BACKENDS:
        usable_bytes = free_bytes(next(model.parameters()).device, max_memory_bytes)
        batch_size = min(batch_size, _slots_that_fit(prefixes.cache, prefixes.backend, requests, usable_bytes))
    if prefixes.backend == "shared prefix":
        assert prefixes.cache is not None
        sample_with_shared_prefix(
            model,
            prefixes.cache,
            requests,
            temperature=temperature,
            eos_token_ids=eos_token_ids,
            keys=keys,
            batch_size=batch_size,
            on_finished=on_finished,
        )
        return
    for indices in _batches(requests, batch_size, equal_lengths=prefixes.backend not in CACHED_BACKENDS):
        continuations = _sample_batch(
            model,
            prefixes,
            [requests[index] for index in indices],
            temperature,
            eos_token_ids,
            [keys[index] for index in indices],
        )
        on_finished(dict(zip(indices, continuations, strict=True)))


def _sample_batch(
    model: nn.Module,
    prefixes: PrefilledRollouts,
    requests: Sequence[ContinuationRequest],
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int],
) -> list[Continuation]:
    """Sample one batch with a backend that cannot share prefixes."""
    if prefixes.backend == "repeated cache":
        assert prefixes.cache is not None
        return sample_with_repeated_cache(
            model, prefixes.cache, requests, temperature=temperature, eos_token_ids=eos_token_ids, keys=keys
        )
    if prefixes.backend == FULL_FORWARD:
        return sample_with_full_forward(
            model, prefixes.sequences, requests, temperature=temperature, eos_token_ids=eos_token_ids, keys=keys
        )
    # Imported here because its module needs transformers, whose import takes seconds.
    from odp_callbacks.engine.sampling.generate import sample_with_generate

    return sample_with_generate(
        model, prefixes.sequences, requests, temperature=temperature, eos_token_ids=eos_token_ids, keys=keys
    )


def _slots_that_fit(
    cache: PrefixCache, backend: str, requests: Sequence[ContinuationRequest], usable_bytes: int
) -> int:
    """Count the continuations whose keys and values fit in ``usable_bytes``, at least 1."""
    bytes_per_token = sum(
        states.shape[1] * states.shape[3] * states.element_size() for layer in cache.prompt_layers for states in layer
    )
    copies_prefix = backend == "repeated cache"
    longest = max(request.max_new_tokens + (request.prefix_length if copies_prefix else 0) for request in requests)
    return max(1, usable_bytes // max(1, bytes_per_token * longest))


def _batches(requests: Sequence[ContinuationRequest], batch_size: int, equal_lengths: bool) -> Iterator[list[int]]:
    """Split requests into batches of similarly long prefixes, so that there is little padding.

    Args:
        requests: Where each continuation starts.
        batch_size: The largest number of requests in a batch.
        equal_lengths: Whether all prefixes of a batch must have the same length.

    Yields:
        Indices of the requests of a batch.
    """
    sorted_indices = sorted(
        range(len(requests)), key=lambda index: (requests[index].prefix_length, requests[index].sequence)
    )
    batch: list[int] = []
    for index in sorted_indices:
        length_changes = bool(batch) and requests[index].prefix_length != requests[batch[0]].prefix_length
        if len(batch) == batch_size or (equal_lengths and length_changes):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
