"""The same continuations with all three backends: shared prefix, repeated cache, generate."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from odp_callbacks.engine.sampling.backend_selection import BACKENDS
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from tests.helpers.continuations import (
    END_TOKENS,
    REQUESTS,
    greedy_tokens,
    prefill_prompt,
    prefill_sequences,
    sample,
)
from tests.helpers.models import paddable


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_continuations_are_those_of_the_full_forward(family, batch_size, backend):
    model = paddable(family)
    prefixes = prefill_sequences(model, backend)
    continuations = sample(model, prefixes, REQUESTS, temperature=1e-4, batch_size=batch_size, eos_token_ids=END_TOKENS)
    ended_count = 0
    for request, continuation in zip(REQUESTS, continuations, strict=True):
        expected = greedy_tokens(model, request)
        assert continuation.tokens == expected
        assert continuation.truncated == (expected[-1] not in END_TOKENS)
        ended_count += not continuation.truncated
    assert 0 < ended_count < len(REQUESTS), "the case must contain ended and truncated continuations"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("given_length", [0, 1])
def test_outcomes_have_their_exact_frequencies(world, temperature, given_length, backend):
    """Of whole responses, and of continuations after a given first token."""
    given_tokens = (2,)[:given_length]
    probabilities = {
        response: probability
        for response, probability in world.responses(temperature).items()
        if response[:given_length] == given_tokens
    }
    count = 5000
    input_ids = torch.cat([world.prompt_ids, torch.tensor(given_tokens, dtype=torch.long)])
    request = ContinuationRequest(0, len(input_ids) - 1, int(input_ids[-1]), world.horizon - given_length)
    prefixes = prefill_prompt(world.model, input_ids[:-1], backend)
    # The batch size is no divisor of the count, so slots start new requests at unequal times.
    continuations = sample(
        world.model, prefixes, [request] * count, temperature=temperature, eos_token_ids=[0], batch_size=700
    )
    counts = Counter(given_tokens + continuation.tokens for continuation in continuations)
    assert set(counts) <= set(probabilities)
    total = sum(probabilities.values())
    expected = np.array([count * probability / total for probability in probabilities.values()])
    observed = np.array([counts[response] for response in probabilities])
    rare = expected < 8
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    assert len(expected) > 10
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert all(continuation.truncated == (continuation.tokens[-1] != 0) for continuation in continuations)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_of_several_end_tokens_ends_a_continuation(world, backend):
    prefixes = prefill_prompt(world.model, world.prompt_ids, backend)
    continuations = sample(world.model, prefixes, [ContinuationRequest(0, 2, 1, 20)] * 300, eos_token_ids=[0, 3])
    for continuation in continuations:
        assert continuation.truncated == (continuation.tokens[-1] not in (0, 3))
        assert not {0, 3} & set(continuation.tokens[:-1])
    assert {continuation.tokens[-1] for continuation in continuations if not continuation.truncated} == {0, 3}
    lengths = {len(continuation.tokens) for continuation in continuations}
    assert 1 in lengths, "some continuations end with their first token"
    assert len(lengths) > 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_continuations_are_a_function_of_the_seed(world, backend):
    prefixes = prefill_prompt(world.model, world.prompt_ids, backend)
    requests = [ContinuationRequest(0, 1, 2, 8)] * 50
    runs = [sample(world.model, prefixes, requests, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_changes_neither_model_nor_prefixes(family, backend):
    model = paddable(family)
    prefixes = prefill_sequences(model, backend)
    cache = prefixes.cache
    layers = [] if cache is None else [*cache.prompt_layers, *cache.response_layers]
    layers_before = [(keys.clone(), values.clone()) for keys, values in layers]
    config = model.get_base_model().config
    settings, generation = config.to_dict(), model.get_base_model().generation_config.to_dict()
    attention = config._attn_implementation
    random_state = torch.get_rng_state()
    sample(model, prefixes, REQUESTS, eos_token_ids=END_TOKENS)
    assert torch.equal(random_state, torch.get_rng_state())
    assert (config.to_dict(), config._attn_implementation) == (settings, attention)
    assert model.get_base_model().generation_config.to_dict() == generation
    for (keys, values), (keys_before, values_before) in zip(layers, layers_before, strict=True):
        assert torch.equal(keys.nan_to_num(), keys_before.nan_to_num())
        assert torch.equal(values.nan_to_num(), values_before.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_continuation_is_reported_once(world, backend):
    reports = []
    prefixes = prefill_prompt(world.model, world.prompt_ids, backend)
    requests = [ContinuationRequest(0, 1, 2, 2)] * 5
    continuations = sample(world.model, prefixes, requests, batch_size=2, on_finished=reports.append)
    assert {index: continuation for report in reports for index, continuation in report.items()} == dict(
        enumerate(continuations)
    )
    assert sum(map(len, reports)) == 5
    assert sample(world.model, prefixes, []) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_may_be_empty(world, backend):
    prefixes = prefill_prompt(world.model, world.prompt_ids[:0], backend)
    assert len(sample(world.model, prefixes, [ContinuationRequest(0, 0, 1, 3)] * 2)) == 2


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_logits_that_are_no_distribution_are_an_error(backend):
    model = paddable("llama")
    prefixes = prefill_sequences(model, backend)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):  # before any continuation ends
        sample(model, prefixes, [request for request in REQUESTS if request.max_new_tokens > 2])
