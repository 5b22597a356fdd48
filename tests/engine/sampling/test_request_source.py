"""Sources of requests that have nothing at the moment, or requests that need another way of sampling."""

from collections import deque

import pytest

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling import backends
from odp_callbacks.engine.sampling.backend_selection import BACKENDS
from odp_callbacks.engine.sampling.backends import PrefilledRollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.sampling.request_source import ListedRequests, NumberedRequest, SlotUse
from tests.helpers.continuations import END_TOKENS, REQUESTS, prefill_sequences, sample, sample_from
from tests.helpers.models import paddable

KEYS = [Randomness(0).key(index) for index in range(len(REQUESTS))]


class Dependent(ListedRequests):
    """Gives two requests; two more become known whenever two have finished, and the last ones after a wait."""

    def __init__(self, **options):
        super().__init__(REQUESTS, KEYS, range(len(REQUESTS)), **options)
        self.allowed, self.waits, self.given = 2, 0, deque()

    def next_request(self):
        if len(self.given) >= self.allowed:
            return None
        numbered = super().next_request()
        if numbered is not None:
            self.given.append(numbered.number)
        return numbered

    def receive(self, continuations, step):
        super().receive(continuations, step)
        if len(self.continuations) < 6:
            self.allowed = 2 + 2 * (len(self.continuations) // 2)

    def wait(self):
        assert len(self.continuations) == len(self.given)
        self.waits, self.allowed = self.waits + 1, len(REQUESTS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_source_that_learns_while_it_is_sampled(backend, batch_size):
    """The batch shrinks, grows and starts again; the continuations are those of a list of the same requests."""
    model = paddable("llama")
    prefixes = prefill_sequences(model, backend)
    expected = sample(model, prefixes, REQUESTS, eos_token_ids=END_TOKENS)
    source = Dependent()
    sample_from(model, prefixes, source, eos_token_ids=END_TOKENS, batch_size=batch_size)
    assert source.waits == 1
    assert [source.continuations[index] for index in range(len(REQUESTS))] == expected


def test_requests_that_need_full_forward_passes_are_set_aside(monkeypatch):
    model = paddable("llama")
    prefixes = prefill_sequences(model)
    expected = sample(model, prefixes, REQUESTS, eos_token_ids=END_TOKENS, temperature=1e-4)
    used = []
    sample_in_batches = backends.sample_in_batches

    def watched(model, backend, **options):
        used.append(backend)
        sample_in_batches(model, backend, **options)

    monkeypatch.setattr(backends, "sample_in_batches", watched)
    monkeypatch.setattr(PrefilledRollouts, "needs_full_forward", lambda _, model, request: request.sequence == 3)
    source = Dependent()
    sample_from(model, prefixes, source, eos_token_ids=END_TOKENS, temperature=1e-4)
    assert set(used) == {"full forward"}
    assert [source.continuations[index] for index in range(len(REQUESTS))] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_are_counted(backend):
    model = paddable("llama")
    prefixes = prefill_sequences(model, backend)
    source, use = ListedRequests(REQUESTS, KEYS, range(len(REQUESTS))), SlotUse()
    sample_from(model, prefixes, source, batch_size=4, slot_use=use)
    tokens = sum(len(continuation.tokens) for continuation in source.continuations.values())
    assert use.occupied == tokens == sum(request.max_new_tokens for request in REQUESTS)
    assert tokens / 4 <= use.steps <= tokens
    assert use.available <= 4 * use.steps
    assert 0.25 <= use.share <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deadline_in_the_decoding_loop(backend):
    """What has started is received as far as it got, marked as unfinished; the rest is not started."""
    model = paddable("llama")
    prefixes = prefill_sequences(model, backend)
    whole = sample(model, prefixes, REQUESTS)
    unfinished_counts = []
    for seconds in range(2, 12):
        reads = iter(range(10_000))
        source = ListedRequests(REQUESTS, KEYS, range(len(REQUESTS)))
        deadline = Deadline(float(seconds), clock=lambda reads=reads: float(next(reads)))
        sample_from(model, prefixes, source, batch_size=4, deadline=deadline)
        unfinished_counts.append(sum(one.unfinished for one in source.continuations.values()))
        for index, continuation in source.continuations.items():
            tokens = whole[index].tokens
            assert continuation.tokens == (tokens[: len(continuation.tokens)] if continuation.unfinished else tokens)
    assert 0 < max(unfinished_counts) <= 4, "only what has started is received"


def test_a_numbered_request_is_what_it_says():
    source = ListedRequests(REQUESTS, KEYS, [3, 1])
    assert source.next_request() == NumberedRequest(3, REQUESTS[3], KEYS[3])
    assert not source.is_exhausted()
    assert source.next_request() == NumberedRequest(1, REQUESTS[1], KEYS[1])
    assert source.is_exhausted()
    assert source.next_request() is None
