"""The same continuations in all three ways: shared prefix, repeated cache, generate."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from odp_callbacks.engine.sampling import backends as decoders
from odp_callbacks.engine.sampling import continuous_batching as decoding
from odp_callbacks.engine.sampling.backends import BACKENDS, prefill_rollouts, sample_continuations
from odp_callbacks.engine.sampling.prefix_cache import ContinuationRequest
from odp_callbacks.engine.sampling.randomness import Randomness
from tests.helpers.models import FAMILIES, count_tokens, paddable

# Two rollouts of the first question; a response longer and one shorter than the window of 4; an empty prompt.
PROMPTS = [torch.tensor(s, dtype=torch.long) for s in ([1, 6, 7, 8, 9], [], [1, 5, 9, 11, 6, 7])]
RESPONSES = [torch.tensor(s) for s in ([10, 11, 5, 6, 9, 8], [7], [1], [10, 6])]
OWNERS = [0, 0, 1, 2]
SEQUENCES = [torch.cat([PROMPTS[q], r]) for q, r in zip(OWNERS, RESPONSES, strict=True)]
# PrefilledRollouts that end in a prompt, at its end, in a response and at its end, and of no token at all.
STARTS = [
    ContinuationRequest(sequence, prefix, token, limit)
    for sequence, prefix, token, limit in [
        (0, 11, 7, 6), (3, 3, 5, 2), (0, 0, 9, 4), (2, 1, 8, 6), (1, 5, 3, 4), (0, 8, 6, 5),
        (3, 8, 11, 1), (0, 5, 10, 6), (1, 6, 4, 5), (2, 0, 6, 3),
    ]
]  # fmt: skip
ENDS = [8, 10]


def read(model, way="shared prefix"):
    with torch.no_grad():
        return prefill_rollouts(model, PROMPTS, RESPONSES, OWNERS, way)


def sample(model, prefixes, starts, **changes):
    keys = [Randomness(changes.pop("seed", 0)).key(i) for i in range(len(starts))]
    options = {"temperature": 1.0, "eos_token_ids": [], "keys": keys, "batch_size": 64}
    with torch.no_grad():
        return sample_continuations(model, prefixes, starts, **{**options, **changes})


def context(start):
    return torch.cat([SEQUENCES[start.sequence][: start.prefix], torch.tensor([start.token])])


def after_prompt(model, prompt_ids, way):
    with torch.no_grad():
        return prefill_rollouts(model, [prompt_ids], way=way)


@pytest.mark.parametrize("batch_size", [3, 7, 64])
def test_logits_are_those_of_the_full_forward(family, batch_size, monkeypatch):
    """Whoever sits where, whenever it was seated: each row's logits at each of its steps."""
    model = paddable(family)
    prefixes = read(model)
    seen = {}
    step = decoding._Batch.step

    def record(batch, *arguments):
        before = [(owner, int(age)) for owner, age in zip(batch.owners, batch.view.ages, strict=True)]
        rows = []
        with monkeypatch.context() as patch:
            inner = decoding.sample_tokens
            patch.setattr(decoding, "sample_tokens", lambda z, *a: (rows.append(z), inner(z, *a))[1])
            step(batch, *arguments)
        seen.update({place: row for place, row, taken in zip(before, rows[0], batch.taken, strict=True) if taken})

    monkeypatch.setattr(decoding._Batch, "step", record)
    sampled = sample(model, prefixes, STARTS * 2, batch_size=batch_size, eos_token_ids=ENDS)
    for i, (start, found) in enumerate(zip(STARTS * 2, sampled, strict=True)):
        ids = torch.cat([context(start), torch.tensor(found.tokens)])
        with torch.no_grad():
            expected = model(input_ids=ids[None]).logits[0, start.prefix : -1]
        rows = torch.stack([seen[i, age] for age in range(len(found.tokens))])
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_continuations_are_those_of_the_full_forward(family, batch_size, way):
    model = paddable(family)
    found = sample(model, read(model, way), STARTS, temperature=1e-4, batch_size=batch_size, eos_token_ids=ENDS)
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


@pytest.mark.parametrize("way", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("split", [0, 1])
def test_outcomes_have_their_exact_frequencies(world, temperature, split, way):
    """Whole responses, and continuations after a first token that is given."""
    first = (2,)[:split]
    exact = {r: p for r, p in world.responses(temperature).items() if r[:split] == first}
    n = 5000
    ids = torch.cat([world.prompt_ids, torch.tensor(first, dtype=torch.long)])
    start = ContinuationRequest(0, len(ids) - 1, int(ids[-1]), world.horizon - split)
    prefixes = after_prompt(world.model, ids[:-1], way)
    # Not a divisor of n: seats change their owners at unequal times.
    found = sample(world.model, prefixes, [start] * n, temperature=temperature, eos_token_ids=[0], batch_size=700)
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


@pytest.mark.parametrize("way", BACKENDS)
def test_any_of_several_tokens_ends(world, way):
    prefixes = after_prompt(world.model, world.prompt_ids, way)
    found = sample(world.model, prefixes, [ContinuationRequest(0, 2, 1, 20)] * 300, eos_token_ids=[0, 3])
    for continuation in found:
        assert continuation.truncated == (continuation.tokens[-1] not in (0, 3))
        assert not {0, 3} & set(continuation.tokens[:-1])
    assert {c.tokens[-1] for c in found if not c.truncated} == {0, 3}
    assert any(len(c.tokens) == 1 for c in found), "some stop at once"
    assert len({len(c.tokens) for c in found}) > 4


@pytest.mark.parametrize("way", BACKENDS)
def test_the_same_seed_gives_the_same_and_another_another(world, way):
    prefixes = after_prompt(world.model, world.prompt_ids, way)
    starts = [ContinuationRequest(0, 1, 2, 8)] * 50
    runs = [sample(world.model, prefixes, starts, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_each_token_is_run_once(family):
    """A prompt is read once, so is a response; each continuation then costs about as many tokens as it has."""
    model = paddable(family)
    shapes = []
    stop = count_tokens(model, shapes)
    prefixes = read(model)
    assert shapes == [(3, 6), (4, 6)]
    shapes.clear()
    found = sample(model, prefixes, STARTS * 20, eos_token_ids=ENDS, batch_size=32)
    stop()
    assert all(width == 1 for _, width in shapes)
    needed, run = sum(len(c.tokens) for c in found), sum(rows for rows, _ in shapes)
    assert needed <= run <= 1.1 * needed, "seats are empty at the very end only"
    assert max(rows for rows, _ in shapes) == 32
    full = [rows for rows, _ in shapes].index(next(rows for rows, _ in shapes[1:] if rows < 32))
    assert full >= 0.7 * len(shapes), "those who wait take the seats of those who leave"


@pytest.mark.parametrize("way", BACKENDS)
def test_nothing_of_the_model_or_the_prefixes_changes(family, way):
    model = paddable(family)
    prefixes = read(model, way)
    layers = [] if prefixes.cache is None else [*prefixes.cache.trunks, *prefixes.cache.limbs]
    before = [(k.clone(), v.clone()) for k, v in layers]
    config = model.get_base_model().config
    settings, generation = config.to_dict(), model.get_base_model().generation_config.to_dict()
    attention = config._attn_implementation
    state = torch.get_rng_state()
    sample(model, prefixes, STARTS, eos_token_ids=ENDS)
    assert torch.equal(state, torch.get_rng_state())
    assert (config.to_dict(), config._attn_implementation) == (settings, attention)
    assert model.get_base_model().generation_config.to_dict() == generation
    for (k, v), (old_k, old_v) in zip(layers, before, strict=True):
        assert torch.equal(k.nan_to_num(), old_k.nan_to_num())
        assert torch.equal(v.nan_to_num(), old_v.nan_to_num())


@pytest.mark.parametrize("way", BACKENDS)
def test_every_continuation_is_told_of_once(world, way):
    told = []
    prefixes = after_prompt(world.model, world.prompt_ids, way)
    found = sample(world.model, prefixes, [ContinuationRequest(0, 1, 2, 2)] * 5, batch_size=2, finished=told.append)
    assert {i: c for done in told for i, c in done.items()} == dict(enumerate(found))
    assert sum(map(len, told)) == 5
    assert sample(world.model, prefixes, []) == []


@pytest.mark.parametrize("way", BACKENDS)
def test_an_empty_prefix(world, way):
    prefixes = after_prompt(world.model, world.prompt_ids[:0], way)
    assert len(sample(world.model, prefixes, [ContinuationRequest(0, 0, 1, 3)] * 2)) == 2


@pytest.mark.parametrize("way", BACKENDS[:2])
def test_logits_that_are_no_distribution_are_an_error(way):
    model = paddable("llama")
    prefixes = read(model, way)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):  # before any of them ends
        sample(model, prefixes, [s for s in STARTS if s.limit > 2])


def test_looking_seldom_who_has_ended_changes_nothing(world, monkeypatch):
    """On an accelerator the batch is looked at every few steps; what a row writes past its end is dropped."""
    before = decoding._Batch.__init__

    def patient(batch, *arguments):
        before(batch, *arguments)
        batch.patience = 3

    monkeypatch.setattr(decoding._Batch, "__init__", patient)
    model = world.model
    prefixes = after_prompt(model, world.prompt_ids, "shared prefix")
    starts = [ContinuationRequest(0, 2, token, limit) for token in range(5) for limit in (1, 2, 3, 4, 7)]
    found = sample(model, prefixes, starts, temperature=1e-4, eos_token_ids=[0], batch_size=4)
    monkeypatch.undo()
    assert found == sample(model, prefixes, starts, temperature=1e-4, eos_token_ids=[0], batch_size=4)


class TestChoice:
    def test_every_family_shares_prefixes(self, family, recwarn):
        decoders._known.clear()
        assert decoders.backend_of(paddable(family)) == BACKENDS[0]
        assert not [w for w in recwarn if "continuations" in str(w.message)]

    @pytest.mark.parametrize(
        ("kind", "sizes", "way"),
        [
            ("mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, "generate"),
            ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 4}, "repeated cache"),
        ],
    )
    def test_others_fall_back_and_say_so_once(self, kind, sizes, way):
        """Recurrent, and with a bias by position: they still give the full forward's continuations."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(kind, vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        with pytest.warns(UserWarning, match=f"sampled by {way}.*same distribution.*shared prefix") as warned:
            assert [read(model, None).way for _ in range(2)] == [way] * 2
        assert len([w for w in warned if "same distribution" in str(w.message)]) == 1
        starts = [s for s in STARTS if s.prefix > 0]
        assert decoders.backend_of(model) == way
        found = sample(model, read(model, None), starts, temperature=1e-4, eos_token_ids=ENDS)
        for start, continuation in zip(starts, found, strict=True):
            ids, written = context(start), []
            with torch.no_grad():
                while len(written) < start.limit and not (written and written[-1] in ENDS):
                    written.append(int(model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax()))
                    ids = torch.cat([ids, torch.tensor(written[-1:])])
            assert continuation.tokens == tuple(written)

    def test_a_window_that_attention_is_not_told_of_is_noticed(self, monkeypatch):
        """The trial is shorter than any real window, so a model that cuts by its mask alone would pass it."""
        model = paddable("mistral", sliding_window=64)
        assert decoders.backend_of(model) == BACKENDS[0]
        decoders._known.clear()
        for layer in model.get_base_model().model.layers:
            silent = copy.copy(layer.self_attn.config)
            silent.sliding_window = None
            monkeypatch.setattr(layer.self_attn, "config", silent)
        with pytest.warns(UserWarning, match="not told of"):
            assert read(model, None).way == "repeated cache"


def test_families_have_windows_and_groups():
    assert {FAMILIES[f].get("sliding_window") for f in FAMILIES} == {None, 4}
