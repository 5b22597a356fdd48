"""The batch of the backend "shared prefix", which stays full."""

import pytest
import torch

from odp_callbacks.engine.sampling import continuous_batching
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from tests.helpers.continuations import END_TOKENS, REQUESTS, context_of, prefill_prompt, prefill_sequences, sample
from tests.helpers.models import FAMILIES, count_tokens, paddable


@pytest.mark.parametrize("batch_size", [3, 7, 64])
def test_logits_are_those_of_the_full_forward(family, batch_size, monkeypatch):
    """Each continuation's logits at each of its steps, whatever its slot and whenever it started."""
    model = paddable(family)
    prefixes = prefill_sequences(model)
    logits_at = {}
    step = continuous_batching._ContinuousBatch.step

    def record_logits(batch, *arguments):
        places = [
            (numbered.number, int(length))
            for numbered, length in zip(batch.running, batch.view.suffix_lengths, strict=True)
        ]
        recorded = []
        with monkeypatch.context() as patch:
            original = continuous_batching.sample_tokens
            patch.setattr(
                continuous_batching,
                "sample_tokens",
                lambda logits, *rest: (recorded.append(logits), original(logits, *rest))[1],
            )
            step(batch, *arguments)
        slots = zip(places, recorded[0], batch.occupied, strict=True)
        logits_at.update({place: logits for place, logits, occupied in slots if occupied})

    monkeypatch.setattr(continuous_batching._ContinuousBatch, "step", record_logits)
    sampled = sample(model, prefixes, REQUESTS * 2, batch_size=batch_size, eos_token_ids=END_TOKENS)
    for index, (request, continuation) in enumerate(zip(REQUESTS * 2, sampled, strict=True)):
        input_ids = torch.cat([context_of(request), torch.tensor(continuation.tokens)])
        with torch.no_grad():
            expected = model(input_ids=input_ids[None]).logits[0, request.prefix_length : -1]
        logits = torch.stack([logits_at[index, length] for length in range(len(continuation.tokens))])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_each_token_is_run_once(family):
    """Prompts and responses are run once; a continuation then costs about as many tokens as it has."""
    model = paddable(family)
    shapes = []
    stop_counting = count_tokens(model, shapes)
    prefixes = prefill_sequences(model)
    assert shapes == [(3, 6), (4, 6)]
    shapes.clear()
    continuations = sample(model, prefixes, REQUESTS * 20, eos_token_ids=END_TOKENS, batch_size=32)
    stop_counting()
    assert all(width == 1 for _, width in shapes)
    row_counts = [row_count for row_count, _ in shapes]
    sampled_count = sum(len(continuation.tokens) for continuation in continuations)
    assert sampled_count <= sum(row_counts) <= 1.1 * sampled_count, "slots are free only at the very end"
    assert max(row_counts) == 32
    full_steps = row_counts.index(next(row_count for row_count in row_counts[1:] if row_count < 32))
    assert full_steps >= 0.7 * len(shapes), "waiting requests take the slots of finished continuations"


def test_checking_less_often_changes_nothing(world, monkeypatch):
    """On an accelerator the batch is checked every few steps; tokens after a continuation's end are dropped."""
    original_init = continuous_batching._ContinuousBatch.__init__

    def init_with_long_interval(batch, *arguments):
        original_init(batch, *arguments)
        batch.check_interval = 3

    monkeypatch.setattr(continuous_batching._ContinuousBatch, "__init__", init_with_long_interval)
    model = world.model
    prefixes = prefill_prompt(model, world.prompt_ids, "shared prefix")
    requests = [ContinuationRequest(0, 2, token, limit) for token in range(5) for limit in (1, 2, 3, 4, 7)]
    continuations = sample(model, prefixes, requests, temperature=1e-4, eos_token_ids=[0], batch_size=4)
    monkeypatch.undo()
    assert continuations == sample(model, prefixes, requests, temperature=1e-4, eos_token_ids=[0], batch_size=4)


def test_families_cover_sliding_windows():
    assert {FAMILIES[family].get("sliding_window") for family in FAMILIES} == {None, 4}
