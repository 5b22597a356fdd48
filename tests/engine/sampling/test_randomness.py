"""Draws that depend on what they are for alone."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from odp_callbacks.engine import BaseTeacher, Probe, ProbeConfig, Teacher
from odp_callbacks.engine.sampling.randomness import Randomness, as_keys, uniforms
from odp_callbacks.storage import concatenate
from tests.helpers.worlds import make_world


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, in Python's whole numbers."""
    mask, found = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_numbers_are_splitmix64s() -> None:
    # The first outputs from 1234567, as they are published with the generator.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    for key in (0, 1234567, 2**63 - 1):
        expected = [z >> 11 for z in splitmix64(key, 12)]
        keys = torch.full((4,), key)
        found = (uniforms(keys, torch.arange(4), 3) * 2**53).long().flatten().tolist()
        assert found == expected


def test_keys_and_steps_give_independent_uniform_numbers() -> None:
    keys = as_keys([Randomness(0).key("q", i) for i in range(4000)], torch.device("cpu"))
    u = torch.stack([uniforms(keys, torch.full_like(keys, step), 2) for step in range(5)], dim=1).flatten(1).numpy()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(u.T) - np.eye(10)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(u))
    neighbours = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(len(u))


def test_names_are_told_apart() -> None:
    names = [("a", 1), ("a", "1"), ("a1",), ("a", (1,)), ("a", 1, 0), (("a", 1),), ("\ud800",)]
    assert len({Randomness(0).key(*name) for name in names} | {Randomness(1).key("a", 1)}) == len(names) + 1
    assert torch.rand(1, generator=Randomness(3).generator("x")) == torch.rand(
        1, generator=Randomness(3).generator("x")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"nodes": "every"},
        {"nodes": "exponential", "batch_size": 3},
        {"nodes": "uniform"},
        {"nodes": "every", "projections": 2},
        {"budget": 0},
    ],
    ids=["every", "exponential", "uniform", "projected", "free"],
)
@pytest.mark.parametrize("way", ["shared prefix", "repeated cache", "generate"])
def test_a_probe_of_four_questions_is_two_of_two(options: dict, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world("gpt2", seed=3, initializer_range=0.5)
    monkeypatch.setattr("odp_callbacks.engine.sampling.backends._told_way", lambda model: way)
    if "projections" in options:
        monkeypatch.setattr("odp_callbacks.engine.probe.projection_is_cheaper", lambda *_: True)
    config = ProbeConfig(**{"rollouts_per_question": 3, "max_new_tokens": 3, "continuations": 3, **options})
    probe = Probe(
        world.model, world.tokenizer, world.reward, {"base": BaseTeacher(), "b": Teacher("b {prompt}")}, config
    )
    rows = [{"prompt": p} for p in ("a b", "c", "a b", "b a")]
    whole = probe.run(rows, seed=5, ids=list("0123"))
    parts = concatenate([probe.run(rows[:1], seed=5, ids=["0"]), probe.run(rows[1:], seed=5, ids=list("123"))])
    assert [r.text for r in whole.rollouts] == [r.text for r in parts.rollouts]
    texts = {q: [r.text for r in whole.rollouts if r.question == q] for q in "02"}
    assert texts["0"] != texts["2"], "the same question twice is asked twice"
    assert len(whole.nodes) == len(parts.nodes)
    for a, b in zip(whole.nodes, parts.nodes, strict=True):
        assert (a.rollout, a.question, a.depth) == (b.rollout, b.question, b.depth)
        for name in ("tokens", "count", "total", "total_square", "exact"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(a.gram, b.gram, rtol=1e-4, atol=1e-9)
    other = probe.run(rows, seed=6, ids=list("0123"))
    assert [r.text for r in whole.rollouts] != [r.text for r in other.rollouts]


def test_a_student_draws_what_its_policy_says() -> None:
    """Over many keys, the first token's frequencies are the policy's."""
    from odp_callbacks.engine.prompts import as_questions
    from odp_callbacks.engine.rollouts import sample_rollouts

    world = make_world(seed=3, initializer_range=0.5)
    with torch.no_grad():
        found = sample_rollouts(
            world.model, world.tokenizer, as_questions([world.row], world.tokenizer), per_question=4000,
            max_new_tokens=1, temperature=1.0, eos_token_ids=[0], randomness=Randomness(0), batch_size=512,
        )  # fmt: skip
        policy: Tensor = torch.softmax(world.solve()[()].logits, dim=-1)
    counts = np.bincount([r.response_ids[0] for r in found], minlength=5)
    assert stats.chisquare(counts, 4000 * policy.numpy()).pvalue > 1e-3
