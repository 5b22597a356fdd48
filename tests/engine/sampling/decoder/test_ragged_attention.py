"""One kernel attends for all slots, whatever they read; Triton's interpreter runs it here on the CPU."""

import sys

import pytest
import torch

from odp_callbacks.engine.sampling import continuous_batching
from odp_callbacks.engine.sampling.decoder.choice import DecoderChoice, choose_decoder, compare_steps
from odp_callbacks.engine.sampling.decoder.layers import HeadShape
from odp_callbacks.engine.sampling.request_source import ListedRequests, SlotUse
from tests.helpers.continuations import END_TOKENS, REQUESTS, prefill_sequences
from tests.helpers.models import paddable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")


def attention_of_one_head(query, keys, values, positions, own_position, scaling, window):
    """The textbook's softmax over everything that a query sees."""
    scores = query @ keys.T * scaling
    if window:
        scores = scores.masked_fill(positions <= own_position - window, -torch.inf)
    return torch.softmax(scores, -1) @ values


@pytest.mark.parametrize("window", [0, 30, 5, 1])
@pytest.mark.parametrize("width", [24, 16])
def test_every_slot_sees_what_its_row_of_the_table_says(window, width):
    """Slots that read a prompt alone, a prompt and a response, and several blocks of positions."""
    from odp_callbacks.engine.sampling.decoder.ragged_kernel import attend_by_table

    generator = torch.Generator().manual_seed(0)
    heads = HeadShape(2, 3, width)
    query_key_value = torch.randn(3, 2, 5, width, generator=generator)
    parts = tuple(
        tuple(torch.randn(count, 2, length, width, generator=generator) for _ in "kv")
        for count, length in ((2, 70), (2, 20), (3, 9))
    )
    table = torch.tensor([[0, 1, 1], [70, 33, 33], [0, 1, 0], [0, 20, 7], [0, 33, 33], [70, 53, 40]])
    suffix_lengths = torch.tensor([0, 8, 3])
    outputs = attend_by_table(query_key_value, parts, table, suffix_lengths, heads, 0.3, window)
    for slot, head in [(slot, head) for slot in range(3) for head in range(2)]:
        prompt, prompt_length, response, response_length, response_start, suffix_start = table[:, slot].tolist()
        read = [
            (parts[0], prompt, prompt_length, 0),
            (parts[1], response, response_length, response_start),
            (parts[2], slot, int(suffix_lengths[slot]) + 1, suffix_start),
        ]
        keys, values = (
            torch.cat([part[kind][sequence, head, :length] for part, sequence, length, _ in read]) for kind in (0, 1)
        )
        positions = torch.cat([start + torch.arange(length) for _, _, length, start in read])
        expected = attention_of_one_head(
            query_key_value[slot, head, :3], keys, values, positions, positions[-1], 0.3, window
        )
        torch.testing.assert_close(outputs[slot].view(2, 3, width)[head], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_steps_by_the_kernel_are_those_of_the_model(family):
    model = paddable(family).float()
    cache = prefill_sequences(model).cache
    parts = choose_decoder(model, cache, 30, 2**30).parts
    compare_steps(model, parts, cache, 30, by_table=True)


def listed_continuations(model, cache, decoder):
    source = ListedRequests(REQUESTS * 2, list(range(2 * len(REQUESTS))), list(range(2 * len(REQUESTS))), None)
    with torch.no_grad():
        continuous_batching.sample_with_shared_prefix(
            model, cache, source, temperature=1.0, eos_token_ids=END_TOKENS, batch_size=5, slot_use=SlotUse(),
            decoder=decoder,
        )  # fmt: skip
    return source.continuations


def test_a_step_uses_the_same_memory_until_the_number_of_slots_changes(monkeypatch):
    """Otherwise a captured step would read what is no longer there; and the tokens are those of attention by blocks."""
    model = paddable("mistral").float()
    cache = prefill_sequences(model).cache
    choice = choose_decoder(model, cache, 30, 2**30)
    batch_class = continuous_batching._ContinuousBatch
    sample_token, addresses = batch_class.sample_token, {}

    def addresses_of(batch):
        states = [getattr(batch, name) for name in continuous_batching.STATES_OF_SLOTS]
        attention = batch.slots.attention
        states += [batch.all_valid, attention.table, attention.view.suffix_lengths]
        states += [states for layer in range(2) for states in attention.suffixes.by_slot(layer)]
        return [tensor.data_ptr() for tensor in states]

    def recorded(batch):
        before = addresses_of(batch)
        sample_token(batch)
        assert addresses_of(batch) == before
        assert addresses.setdefault((id(batch), batch.changes), before) == before

    replace_states = batch_class._replace_states

    def counted(batch, replacement):
        batch.changes = getattr(batch, "changes", 0) + 1
        replace_states(batch, replacement)

    by_blocks = listed_continuations(model, cache, choice)
    monkeypatch.setattr(batch_class, "sample_token", recorded)
    monkeypatch.setattr(batch_class, "_replace_states", counted)
    by_table = listed_continuations(model, cache, DecoderChoice(choice.parts, by_table=True))
    assert by_table == by_blocks
    assert len(addresses) > 1
