import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.engine.sampling.decoder.prefix_blocks import prefix_blocks
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache
from odp_callbacks.engine.sampling.requests import ContinuationRequest

PROMPT_LENGTHS, RESPONSE_LENGTHS, PROMPT_OF = (5, 0, 9, 2), (6, 1, 30, 4, 3), (2, 0, 2, 1, 3)


def cache_of_lengths():
    states = [(torch.zeros(count, 1, 30, 1),) * 2 for count in (4, 5)]
    return PrefixCache([states[0]], PROMPT_LENGTHS, [states[1]], RESPONSE_LENGTHS, PROMPT_OF)


@given(
    places=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=12),
    call_cost=st.sampled_from([0, 30, math.inf]),
    window=st.sampled_from([0, 4]),
)
def test_every_slot_sees_exactly_its_prefix(places, call_cost, window):
    """Whatever is joined: the positions that a slot sees, level by level, are those of its own text."""
    totals = [PROMPT_LENGTHS[prompt] + length for prompt, length in zip(PROMPT_OF, RESPONSE_LENGTHS, strict=True)]
    requests = [ContinuationRequest(sequence, int(share * totals[sequence]), 0, 3) for sequence, share in places]
    view = cache_of_lengths().shared_prefix_view(requests, torch.device("cpu"), 3)
    seen = {slot: [] for slot in range(len(requests))}
    blocks = prefix_blocks(view, call_cost)
    for block in blocks:
        mask = block.mask(view, window, 1, torch.float32)
        for place, slot in ((place, int(slot)) for place, slot in enumerate(block.slots.flatten()) if slot >= 0):
            group, row = divmod(place, block.slots.shape[1])
            is_prompt = view.levels[block.level].layers[0][0].shape[0] == len(PROMPT_LENGTHS)
            sequence = block.first_sequence + group
            request = requests[slot]
            prompt = PROMPT_OF[request.sequence]
            assert sequence == (prompt if is_prompt else request.sequence)
            visible = range(block.longest_read) if mask is None else torch.nonzero(mask[group, 0, row] == 0).flatten()
            seen[slot] += [int(position) + (0 if is_prompt else PROMPT_LENGTHS[prompt]) for position in visible]
    for slot, request in enumerate(requests):
        first = max(0, request.prefix_length - window + 1) if window else 0
        assert seen[slot] == list(range(first, request.prefix_length))
    if call_cost == math.inf:
        assert len(blocks) == len(view.levels)
