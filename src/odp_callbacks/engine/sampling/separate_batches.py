"""Sampling with the backends that cannot share prefixes: one batch after the other, each until all its rows end."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.backend_selection import FULL_FORWARD
from odp_callbacks.engine.sampling.full_forward import sample_with_full_forward
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache
from odp_callbacks.engine.sampling.repeated_cache import sample_with_repeated_cache
from odp_callbacks.engine.sampling.request_source import NumberedRequest, RequestSource, SlotUse
from odp_callbacks.engine.sampling.requests import Continuation


def sample_in_batches(
    model: nn.Module,
    backend: str,
    sequences: Sequence[Tensor],
    cache: PrefixCache | None,
    source: RequestSource,
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    batch_size: int,
    deadline: Deadline | None = None,
    cut_alike: bool = False,
    slot_use: SlotUse,
) -> None:
    """Sample what a source asks for, until it has nothing at the moment or the deadline has passed.

    Args:
        model: The student, in evaluation mode.
        backend: ``"repeated cache"``, ``"generate"`` or ``"full forward"``.
        sequences: ``(T_s,)`` int64 each.
        cache: Their keys and values, for ``"repeated cache"``.
        source: Gives the requests.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        batch_size: The largest number of continuations at a time.
        deadline: When to stop; None: no limit.
        cut_alike: Whether each batch gets an equal share of the time that is left, so that all are cut at similar
            lengths.
        slot_use: Counts the steps and the slots, from where it stands.
    """
    waiting: list[NumberedRequest] = []
    slots = 0
    while True:
        while (numbered := source.next_request()) is not None:
            waiting.append(numbered)
        if not waiting:
            return
        equal_lengths = backend != "repeated cache"
        limit = deadline
        if deadline is not None and cut_alike:
            limit = deadline.part(batch_count(waiting, batch_size, equal_lengths))
        batch = next_batch(waiting, batch_size, equal_lengths)
        chosen = {numbered.number for numbered in batch}
        waiting = [numbered for numbered in waiting if numbered.number not in chosen]
        source.start(list(chosen), slot_use.steps)
        continuations = _sample_batch(model, backend, sequences, cache, batch, temperature, eos_token_ids, limit)
        lengths = [len(continuation.tokens) for continuation in continuations]
        slots = max(slots, len(batch))
        slot_use.steps += max(lengths)
        slot_use.occupied += sum(lengths)
        slot_use.available += slots * max(lengths)
        received = {numbered.number: one for numbered, one in zip(batch, continuations, strict=True)}
        source.receive(received, slot_use.steps)
        if deadline is not None and deadline.has_passed:
            return


def batch_count(waiting: Sequence[NumberedRequest], batch_size: int, equal_lengths: bool) -> int:
    """Count the batches that requests will take.

    Examples:
        >>> from odp_callbacks.engine.sampling.requests import ContinuationRequest
        >>> waiting = [NumberedRequest(number, ContinuationRequest(0, number % 2, 5, 9), 0) for number in range(5)]
        >>> batch_count(waiting, 2, equal_lengths=False), batch_count(waiting, 2, equal_lengths=True)
        (3, 3)
    """
    if not equal_lengths:
        return math.ceil(len(waiting) / batch_size)
    counts = Counter(numbered.request.prefix_length for numbered in waiting)
    return sum(math.ceil(count / batch_size) for count in counts.values())


def next_batch(waiting: Sequence[NumberedRequest], batch_size: int, equal_lengths: bool) -> list[NumberedRequest]:
    """Choose the request that has waited longest, and those with the prefixes most alike in length.

    Args:
        waiting: The requests, at least one.
        batch_size: The largest number of requests in the batch.
        equal_lengths: Whether all prefixes of the batch must have the same length.

    Examples:
        >>> from odp_callbacks.engine.sampling.requests import ContinuationRequest
        >>> waiting = [NumberedRequest(number, ContinuationRequest(0, number % 2, 5, 9), 0) for number in range(5)]
        >>> [numbered.number for numbered in next_batch(waiting, 2, equal_lengths=True)]
        [0, 2]
    """
    first_length = waiting[0].request.prefix_length

    def distance(numbered: NumberedRequest) -> int:
        return abs(numbered.request.prefix_length - first_length)

    candidates = [numbered for numbered in waiting if not equal_lengths or distance(numbered) == 0]
    return sorted(candidates, key=distance)[:batch_size]


def _sample_batch(
    model: nn.Module,
    backend: str,
    sequences: Sequence[Tensor],
    cache: PrefixCache | None,
    batch: Sequence[NumberedRequest],
    temperature: float,
    eos_token_ids: Sequence[int],
    deadline: Deadline | None,
) -> list[Continuation]:
    """Sample one batch; the arguments are those of :func:`sample_in_batches`."""
    requests = [numbered.request for numbered in batch]
    options: dict[str, Any] = {
        "temperature": temperature,
        "eos_token_ids": eos_token_ids,
        "keys": [numbered.key for numbered in batch],
        "deadline": deadline,
    }
    if backend == "repeated cache":
        assert cache is not None
        return sample_with_repeated_cache(model, cache, requests, **options)
    if backend == FULL_FORWARD:
        return sample_with_full_forward(model, sequences, requests, **options)
    # Imported here because its module needs transformers, whose import takes seconds.
    from odp_callbacks.engine.sampling.generate import sample_with_generate

    return sample_with_generate(model, sequences, requests, **options)
