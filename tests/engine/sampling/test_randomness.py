"""Random numbers that depend on their name only."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from odp_callbacks.engine import BaseTeacher, Probe, ProbeConfig, Teacher
from odp_callbacks.engine.sampling.backend_selection import BACKENDS, BackendSelection
from odp_callbacks.engine.sampling.length_verdicts import LengthVerdict
from odp_callbacks.engine.sampling.randomness import Randomness, as_key_tensor, uniforms
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import concatenate
from tests.helpers.probes import ALL_GRADIENTS
from tests.helpers.worlds import make_world


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, in Python's integers."""
    mask, outputs = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        output = state
        output = ((output ^ (output >> 30)) * 0xBF58476D1CE4E5B9) & mask
        output = ((output ^ (output >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(output ^ (output >> 31))
    return outputs


def test_uniforms_are_outputs_of_splitmix64() -> None:
    # The first outputs from the state 1234567, as published with the generator.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    for key in (0, 1234567, 2**63 - 1):
        expected = [output >> 11 for output in splitmix64(key, 12)]
        keys = torch.full((4,), key)
        numbers = (uniforms(keys, torch.arange(4), 3) * 2**53).long().flatten().tolist()
        assert numbers == expected


def test_keys_and_steps_give_independent_uniform_numbers() -> None:
    keys = as_key_tensor([Randomness(0).key("q", i) for i in range(4000)], torch.device("cpu"))
    steps = [uniforms(keys, torch.full_like(keys, step), 2) for step in range(5)]
    numbers = torch.stack(steps, dim=1).flatten(1).numpy()
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(numbers.T) - np.eye(10)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(numbers))
    neighbour_correlation = np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]
    assert abs(neighbour_correlation) < 4 / np.sqrt(len(numbers))


def test_different_names_give_different_keys() -> None:
    names = [("a", 1), ("a", "1"), ("a1",), ("a", (1,)), ("a", 1, 0), (("a", 1),), ("\ud800",)]
    assert len({Randomness(0).key(*name) for name in names} | {Randomness(1).key("a", 1)}) == len(names) + 1
    assert torch.rand(1, generator=Randomness(3).generator("x")) == torch.rand(
        1, generator=Randomness(3).generator("x")
    )


def texts_of(report: ProbeReport, question: str | None = None) -> list[str]:
    return [rollout.text for rollout in report.rollouts if question in (None, rollout.question)]


@pytest.mark.parametrize(
    "options",
    [
        {"nodes": "every"},
        {"nodes": "exponential", "batch_size": 3},
        {"nodes": "uniform"},
        {"nodes": "every", "projections": 2},
    ],
    ids=["every", "exponential", "uniform", "projected"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probe_of_four_questions_equals_two_probes_of_parts(
    options: dict, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world("gpt2", seed=3, initializer_range=0.5)
    monkeypatch.setattr(
        BackendSelection,
        "verdict",
        lambda selection, model, shortest, longest: LengthVerdict(shortest, longest, True, backend, False),
    )
    monkeypatch.setattr(BackendSelection, "warn_of", lambda selection, model, verdict: None)
    if "projections" in options:
        monkeypatch.setattr("odp_callbacks.engine.gradients.gradient_stage.projection_is_cheaper", lambda *_: True)
    # A sample of nodes with gradients would be one of the whole probe's nodes.
    measure = {"continuations": 3, **ALL_GRADIENTS}
    config = ProbeConfig(**{"rollouts_per_question": 3, "max_new_tokens": 3, **measure, **options})
    probe = Probe(
        world.model, world.tokenizer, world.reward, {"base": BaseTeacher(), "b": Teacher("b {prompt}")}, config
    )
    rows = [{"prompt": prompt} for prompt in ("a b", "c", "a b", "b a")]
    whole = probe.run(rows, seed=5, ids=list("0123"))
    parts = concatenate([probe.run(rows[:1], seed=5, ids=["0"]), probe.run(rows[1:], seed=5, ids=list("123"))])
    assert texts_of(whole) == texts_of(parts)
    assert texts_of(whole, "0") != texts_of(whole, "2"), "equal prompts with different ids get different rollouts"
    assert len(whole.nodes) == len(parts.nodes)
    for node, part_node in zip(whole.nodes, parts.nodes, strict=True):
        assert (node.rollout, node.question, node.depth) == (part_node.rollout, part_node.question, part_node.depth)
        for name in ("tokens", "count", "total", "total_square", "exact"):
            np.testing.assert_array_equal(getattr(node, name), getattr(part_node, name))
        np.testing.assert_allclose(node.gram, part_node.gram, rtol=1e-4, atol=1e-9)
    other_seed = probe.run(rows, seed=6, ids=list("0123"))
    assert texts_of(whole) != texts_of(other_seed)


def test_first_tokens_have_the_frequencies_of_the_policy() -> None:
    """Over many keys."""
    from odp_callbacks.engine.prompts import as_questions
    from odp_callbacks.engine.rollouts import sample_rollouts

    world = make_world(seed=3, initializer_range=0.5)
    with torch.no_grad():
        rollouts = sample_rollouts(
            world.model, world.tokenizer, as_questions([world.row], world.tokenizer), per_question=4000,
            max_new_tokens=1, temperature=1.0, eos_token_ids=[0], randomness=Randomness(0), batch_size=512,
        )  # fmt: skip
        policy: Tensor = torch.softmax(world.solve()[()].logits, dim=-1)
    counts = np.bincount([rollout.response_ids[0] for rollout in rollouts], minlength=5)
    assert stats.chisquare(counts, 4000 * policy.numpy()).pvalue > 1e-3
