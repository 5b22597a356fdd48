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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.engines.request_batches import sample_with_engine
from odp_callbacks.engine.sampling.backend_selection import BACKENDS, FULL_FORWARD, SELECTION
from odp_callbacks.engine.sampling.continuous_batching import sample_with_shared_prefix
from odp_callbacks.engine.sampling.decoder.choice import choose_decoder
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache, extend_prefix_cache, prefill
from odp_callbacks.engine.sampling.randomness import fresh_keys
from odp_callbacks.engine.sampling.request_source import ListedRequests, RequestSource, SeparatedRequests, SlotUse
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, FinishedCallback
from odp_callbacks.engine.sampling.separate_batches import sample_in_batches

if TYPE_CHECKING:
    from odp_callbacks.engine.engines.student_engine import StudentEngine

CACHED_BACKENDS = BACKENDS[:2]
"""The backends that read the keys and values of :class:`PrefilledRollouts`."""


@dataclass(frozen=True)
class PrefilledRollouts:
    """Sequences that continuations start from.

    Attributes:
        sequences: ``(T_s,)`` int64 each.
        cache: Their keys and values; None where the backend keeps its own.
        backend: One of :data:`~odp_callbacks.engine.sampling.backend_selection.BACKENDS`, or the name of the engine.
        uncached: Indices of the sequences whose continuations are sampled by full forward passes.
        lengths: The smallest and the largest number of tokens for which the backend was chosen; None if it was given.
        engine: Samples in place of the student's own model; None: a backend does.
    """

    sequences: tuple[Tensor, ...]
    cache: PrefixCache | None
    backend: str
    uncached: frozenset[int] = frozenset()
    lengths: tuple[int, int] | None = None
    engine: "StudentEngine | None" = None

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
    engine: "StudentEngine | None" = None,
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
        engine: Samples in place of ``model``, which then is not run; None: a backend does.
    """
    if responses is None:
        prompt_of_response = range(len(prompts))
        sequences = list(prompts)
    else:
        sequences = [
            torch.cat([prompts[prompt], response])
            for prompt, response in zip(prompt_of_response, responses, strict=True)
        ]
    if engine is not None:
        return PrefilledRollouts(tuple(sequences), None, engine.name, engine=engine)
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
    deadline: Deadline | None = None,
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
        deadline: When to stop; continuations that have not finished by then are marked as such. None: no limit.

    Returns:
        Continuations in the order of ``requests``.

    Raises:
        FloatingPointError: If the model's logits do not define a distribution (NaN).
    """
    keys = fresh_keys(len(requests)) if keys is None else keys

    def start_order(index: int) -> tuple[int, int, int]:
        """Requests of one prompt, and of one sequence, are neighbours; among these, the longest start first."""
        request = requests[index]
        prompt = request.sequence if prefixes.cache is None else prefixes.cache.prompt_of_sequence[request.sequence]
        return prompt, request.sequence, request.prefix_length

    source = ListedRequests(requests, keys, sorted(range(len(requests)), key=start_order), on_finished)
    sample_stream(
        model,
        prefixes,
        source,
        temperature=temperature,
        eos_token_ids=eos_token_ids,
        batch_size=batch_size,
        max_memory_bytes=max_memory_bytes,
        deadline=deadline,
        cut_alike=True,
    )
    not_started = Continuation((), truncated=True, unfinished=True)
    return [source.continuations.get(index, not_started) for index in range(len(requests))]


def sample_stream(
    model: nn.Module,
    prefixes: PrefilledRollouts,
    source: RequestSource,
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    batch_size: int,
    max_memory_bytes: float | None = None,
    deadline: Deadline | None = None,
    cut_alike: bool = False,
    slot_use: SlotUse | None = None,
) -> None:
    """Sample what a source asks for until it is exhausted; it receives the continuations as they finish.

    Args:
        model: The student, in evaluation mode.
        prefixes: From :func:`prefill_rollouts`.
        source: Gives the requests.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        batch_size: The largest number of continuations at a time; it is reduced where they would not fit in memory.
        max_memory_bytes: The largest number of bytes to use; None for half of what is free.
        deadline: When to stop; the source receives what has started and not finished by then as unfinished. None: no
            limit.
        cut_alike: Whether batches that are sampled one after the other share the time until the deadline, so that all
            are cut at similar lengths.
        slot_use: Counts the steps and the slots; None: not counted.

    Raises:
        FloatingPointError: If the model's logits do not define a distribution (NaN).
    """
    if prefixes.engine is not None:
        sample_with_engine(
            prefixes.engine,
            prefixes.sequences,
            source,
            temperature=temperature,
            stop_token_ids=eos_token_ids,
            batch_size=batch_size,
            deadline=deadline,
            cut_alike=cut_alike,
            slot_use=SlotUse() if slot_use is None else slot_use,
        )
        return
    decoder = None
    if prefixes.cache is not None and prefixes.backend in CACHED_BACKENDS:
        usable_bytes = free_bytes(next(model.parameters()).device, max_memory_bytes)
        if prefixes.backend == "shared prefix":
            decoder = choose_decoder(model, prefixes.cache, source.max_tokens, usable_bytes)
            usable_bytes -= decoder.copied_bytes
        longest = source.max_tokens if prefixes.backend == "repeated cache" else source.max_new_tokens
        if decoder is not None and decoder.parts is not None:
            longest += decoder.parts.heads.reserved_places
        batch_size = min(batch_size, _slots_that_fit(prefixes.cache, longest, usable_bytes))
    others = SeparatedRequests(source, lambda request: prefixes.needs_full_forward(model, request))
    options: dict[str, Any] = {
        "temperature": temperature,
        "eos_token_ids": eos_token_ids,
        "batch_size": batch_size,
        "deadline": deadline,
        "slot_use": SlotUse() if slot_use is None else slot_use,
    }
    batch_options = {"sequences": prefixes.sequences, "cache": prefixes.cache, "cut_alike": cut_alike, **options}
    while deadline is None or not deadline.has_passed:
        if prefixes.backend == "shared prefix":
            assert prefixes.cache is not None
            assert decoder is not None
            sample_with_shared_prefix(model, prefixes.cache, others, **options, decoder=decoder)
        else:
            sample_in_batches(model, prefixes.backend, source=others, **batch_options)
        if others.set_aside:
            sample_in_batches(model, FULL_FORWARD, source=others.take_set_aside(), **batch_options)
        elif source.is_exhausted() or (deadline is not None and deadline.has_passed):
            return
        else:
            source.wait()


def _slots_that_fit(cache: PrefixCache, longest: int, usable_bytes: int) -> int:
    """Count the continuations of ``longest`` tokens whose keys and values fit in ``usable_bytes``, at least 1."""
    bytes_per_token = sum(
        states.shape[1] * states.shape[3] * states.element_size() for layer in cache.prompt_layers for states in layer
    )
    return max(1, usable_bytes // max(1, bytes_per_token * longest))
