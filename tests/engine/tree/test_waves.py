"""What belongs to a wave does not depend on the order in which its continuations finish."""

import random

import numpy as np
import pytest

from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest
from odp_callbacks.engine.tree.waves import Wave, sort_by_length, sort_by_sequence, sort_randomly
from odp_callbacks.engine.verifier import Verifier

LENGTHS = [3, 9, 1, 7, 4, 2, 8, 5, 5, 6]


def new_wave(token_limit=float("inf"), expected=5.0):
    scoring = Verifier(lambda prompts, completions: [0.0] * len(prompts)).open()
    requests = [ContinuationRequest(0, 1, 2, 9)] * len(LENGTHS)
    return Wave(
        scoring,
        frozenset({0}),
        requests=requests,
        expected_lengths=[expected] * len(LENGTHS),
        token_limit=token_limit,
    )


def run(wave, slots, generator, earlier_tokens=0.0):
    """Sample with some slots, and let continuations finish in a random order."""
    running = []
    while True:
        while len(running) < slots and (index := wave.start_next(earlier_tokens)) is not None:
            running.append(index)
        if not running:
            return
        index = running.pop(generator.randrange(len(running)))
        wave.finish(index, Continuation((1,) * LENGTHS[index], False))


@pytest.mark.parametrize("limit", [0.0, 11.0, 20.0, 33.0, 49.0, 500.0, float("inf")])
@pytest.mark.parametrize("earlier_tokens", [0.0, 6.0])
def test_a_limit_ends_a_wave_at_the_same_request_whatever_finishes_first(limit, earlier_tokens):
    expected = 0
    while expected < len(LENGTHS) and earlier_tokens + sum(LENGTHS[:expected]) + 2.5 < limit:
        expected += 1
    for seed in range(20):
        generator = random.Random(seed)
        wave = new_wave(limit)
        run(wave, generator.choice([1, 2, 5, 10]), generator, earlier_tokens)
        assert wave.is_sampled(earlier_tokens)
        wave.close(earlier_tokens)
        assert wave.counted == expected
        assert wave.counted_tokens == sum(LENGTHS[:expected])
        assert [wave.counts(index) for index in range(len(LENGTHS))] == [i < expected for i in range(len(LENGTHS))]


def test_a_wave_with_a_limit_starts_what_is_expected_to_fit():
    wave = new_wave(26.0)
    started = 0
    while wave.start_next(0.0) is not None:
        started += 1
    assert started == 5  # 4 * 5 + 2.5 < 26 <= 5 * 5 + 2.5
    assert not wave.is_sampled(0.0)


def test_a_dropped_wave_gives_and_counts_nothing():
    wave = new_wave()
    wave.start_next(0.0)
    wave.dropped = True
    assert wave.start_next(0.0) is None
    assert not wave.is_sampled(0.0)
    assert not wave.counts(0)


def test_orders_of_starts():
    requests = [ContinuationRequest(s, p, 0, 20 - p) for s, p in [(1, 3), (0, 9), (1, 1), (0, 2)]]
    lengths = [4.0, 1.0, 9.0, 9.0]
    assert sort_by_sequence(requests, lengths) == [3, 1, 2, 0]
    assert sort_by_length(requests, lengths) == [2, 3, 0, 1]
    assert sorted(sort_randomly(np.random.default_rng(0))(requests, lengths)) == [0, 1, 2, 3]
