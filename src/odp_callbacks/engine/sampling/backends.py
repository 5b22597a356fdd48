"""Sample continuations with the backend that works for the model.

There are three backends with the same distribution: the shared prefix
(:mod:`~odp_callbacks.engine.sampling.continuous_batching`), a copy of the prefix's cache for each continuation
(:mod:`~odp_callbacks.engine.sampling.repeated_cache`), and transformers' ``generate``
(:mod:`~odp_callbacks.engine.sampling.generate`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.backend_selection import SELECTION
from odp_callbacks.engine.sampling.continuous_batching import sample_with_shared_prefix
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache, extend_prefix_cache, prefill
from odp_callbacks.engine.sampling.randomness import fresh_keys
from odp_callbacks.engine.sampling.repeated_cache import sample_with_repeated_cache
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, FinishedCallback


@dataclass(frozen=True)
class PrefilledRollouts:
    """Sequences that continuations start from.

    Attributes:
        sequences: ``(T_s,)`` int64 each.
        cache: Their keys and values; None where ``generate`` keeps its own.
        backend: One of :data:`~odp_callbacks.engine.sampling.backend_selection.BACKENDS`.
    """

    sequences: tuple[Tensor, ...]
    cache: PrefixCache | None
    backend: str


def prefill_rollouts(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor] | None = None,
    prompt_of_response: Sequence[int] = (),
    backend: str | None = None,
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
            works for this model.
    """
    if backend is None:
        backend = SELECTION.backend_with_warning(model)
    if responses is None:
        sequences = list(prompts)
    else:
        sequences = [
            torch.cat([prompts[prompt], response])
            for prompt, response in zip(prompt_of_response, responses, strict=True)
        ]
    cache = None
    if backend == "shared prefix":
        cache = prefill(model, prompts)
        if responses is not None:
            cache, _ = extend_prefix_cache(model, cache, responses, prompt_of_response)
    elif backend == "repeated cache":
        cache = prefill(model, sequences)
    return PrefilledRollouts(tuple(sequences), cache, backend)


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
    if requests and prefixes.cache is not None:
        usable_bytes = free_bytes(next(model.parameters()).device, max_memory_bytes)
        batch_size = min(batch_size, _slots_that_fit(prefixes.cache, prefixes.backend, requests, usable_bytes))
    if prefixes.backend == "shared prefix":
        assert prefixes.cache is not None
        return sample_with_shared_prefix(
            model,
            prefixes.cache,
            requests,
            temperature=temperature,
            eos_token_ids=eos_token_ids,
            keys=keys,
            batch_size=batch_size,
            on_finished=on_finished,
        )
    sampled: dict[int, Continuation] = {}
    for indices in _batches(requests, batch_size, equal_lengths=prefixes.backend == "generate"):
        continuations = _sample_batch(
            model,
            prefixes,
            [requests[index] for index in indices],
            temperature,
            eos_token_ids,
            [keys[index] for index in indices],
        )
        finished = dict(zip(indices, continuations, strict=True))
        sampled.update(finished)
        if on_finished is not None:
            on_finished(finished)
    return [sampled[index] for index in range(len(requests))]


def _sample_batch(
    model: nn.Module,
    prefixes: PrefilledRollouts,
    requests: Sequence[ContinuationRequest],
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int],
) -> list[Continuation]:
    """Sample one batch with a backend that cannot share prefixes."""
    if prefixes.cache is not None:
        return sample_with_repeated_cache(
            model, prefixes.cache, requests, temperature=temperature, eos_token_ids=eos_token_ids, keys=keys
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
