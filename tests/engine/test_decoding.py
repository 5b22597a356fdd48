from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import count_tokens, paddable
from odp_callbacks.engine import decoding
from odp_callbacks.engine.decoding import Start, prefill, sample_continuations

SEQUENCES = [torch.tensor(s) for s in ([1, 6, 7, 8, 9, 10, 11, 5, 6, 9, 8], [1], [1, 5, 9, 11, 6, 7, 10, 6])]
# Prefixes of unequal length, of zero, at a sequence's end and inside it, longer and shorter than the window of 4.
STARTS = [
    Start(sequence, prefix, token, limit)
    for sequence, prefix, token, limit in [
        (0, 11, 7, 6), (2, 3, 5, 2), (0, 0, 9, 4), (1, 1, 8, 6),
        (2, 8, 11, 1), (0, 5, 10, 6), (0, 0, 4, 5), (1, 0, 6, 3),
    ]
]  # fmt: skip
ENDS = [8, 10]


def sample(model, sequences, starts, **changes):
    options = {"temperature": 1.0, "eos_token_ids": [], "generator": torch.Generator().manual_seed(0), "batch_size": 64}
    with torch.no_grad():
        return sample_continuations(model, prefill(model, sequences), starts, **{**options, **changes})


def context(start):
    return torch.cat([SEQUENCES[start.sequence][: start.prefix], torch.tensor([start.token])])


def test_logits_are_those_of_the_full_forward(family, monkeypatch):
    model = paddable(family)
    starts = [Start(s.sequence, s.prefix, s.token, 6) for s in STARTS]
    steps = []
    forward = decoding._forward

    def record(*arguments):
        logits = forward(*arguments)
        steps.append(logits[:, -1])
        return logits

    with torch.no_grad():
        cache = prefill(model, SEQUENCES)
        monkeypatch.setattr(decoding, "_forward", record)
        sampled = sample_continuations(
            model, cache, starts, temperature=1.0, eos_token_ids=[], generator=None, batch_size=64
        )
        found = torch.stack(steps, dim=1)  # (B, 6, V), neighbours in length together
        order = sorted(range(len(starts)), key=lambda i: (starts[i].prefix, starts[i].sequence))
        for row, i in zip(found, order, strict=True):
            ids = torch.cat([context(starts[i]), torch.tensor(sampled[i].tokens)])
            expected = model(input_ids=ids[None]).logits[0, starts[i].prefix : -1]
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_continuations_are_those_of_the_full_forward(family, batch_size):
    model = paddable(family)
    found = sample(model, SEQUENCES, STARTS, temperature=1e-4, batch_size=batch_size, eos_token_ids=ENDS)
    ended = 0
    for start, continuation in zip(STARTS, found, strict=True):
        ids, written = context(start), []
        with torch.no_grad():
            while len(written) < start.limit and not (written and written[-1] in ENDS):
                written.append(int(model(input_ids=ids[None]).logits[0, -1].argmax()))
                ids = torch.cat([ids, torch.tensor(written[-1:])])
        assert continuation.tokens == tuple(written)
        assert continuation.truncated == (written[-1] not in ENDS)
        ended += not continuation.truncated
    assert 0 < ended < len(STARTS), "the case must hold both kinds of ending"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("split", [0, 1])
def test_outcomes_have_their_exact_frequencies(world, temperature, split):
    """Whole responses, and continuations after a first token that is given."""
    first = (2,)[:split]
    exact = {r: p for r, p in world.responses(temperature).items() if r[:split] == first}
    n = 5000
    ids = torch.cat([world.prompt_ids, torch.tensor(first, dtype=torch.long)])
    start = Start(0, len(ids) - 1, int(ids[-1]), world.horizon - split)
    found = sample(world.model, [ids[:-1]], [start] * n, temperature=temperature, eos_token_ids=[0], batch_size=1000)
    counts = Counter(first + c.tokens for c in found)
    assert set(counts) <= set(exact)
    total = sum(exact.values())
    expected = np.array([n * p / total for p in exact.values()])
    observed = np.array([counts[r] for r in exact])
    rare = expected < 8
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    assert len(expected) > 10
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert all(c.truncated == (c.tokens[-1] != 0) for c in found)


def test_any_of_several_tokens_ends(world):
    found = sample(world.model, [world.prompt_ids], [Start(0, 2, 1, 20)] * 300, eos_token_ids=[0, 3])
    for continuation in found:
        assert continuation.truncated == (continuation.tokens[-1] not in (0, 3))
        assert not {0, 3} & set(continuation.tokens[:-1])
    assert {c.tokens[-1] for c in found if not c.truncated} == {0, 3}
    assert any(len(c.tokens) == 1 for c in found), "some stop at once"
    assert len({len(c.tokens) for c in found}) > 4


def test_the_same_seed_gives_the_same_and_another_another(world):
    starts = [Start(0, 1, 2, 8)] * 50
    runs = [
        sample(world.model, [world.prompt_ids], starts, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_each_token_is_run_once(family):
    """A sequence is prefilled once; each continuation then costs as many tokens as it has, and no padding."""
    model = paddable(family)
    shapes = []
    stop = count_tokens(model, shapes)
    with torch.no_grad():
        cache = prefill(model, SEQUENCES)
        assert shapes == [(3, 11)]
        shapes.clear()
        found = sample_continuations(
            model, cache, STARTS * 5, temperature=1.0, eos_token_ids=ENDS, generator=None, batch_size=16
        )
    stop()
    assert all(width == 1 for _, width in shapes)
    assert sum(rows for rows, _ in shapes) == sum(len(c.tokens) for c in found)
    assert max(rows for rows, _ in shapes) == 16


def test_the_cache_is_read_only(family):
    model = paddable(family)
    with torch.no_grad():
        cache = prefill(model, SEQUENCES)
    before = [(k.clone(), v.clone()) for k, v in cache.layers]
    with torch.no_grad():
        sample_continuations(model, cache, STARTS, temperature=1.0, eos_token_ids=[], generator=None, batch_size=64)
    for (k, v), (old_k, old_v) in zip(cache.layers, before, strict=True):
        assert torch.equal(k.nan_to_num(), old_k.nan_to_num())
        assert torch.equal(v.nan_to_num(), old_v.nan_to_num())


def test_progress_and_nothing_to_do(world):
    told = []
    sample(world.model, [world.prompt_ids], [Start(0, 1, 2, 2)] * 5, batch_size=2, progress=told.append)
    assert told == [2, 4, 5]
    assert sample(world.model, [world.prompt_ids], []) == []
    assert len(sample(world.model, [world.prompt_ids[:0]], [Start(0, 0, 1, 3)] * 2)) == 2
