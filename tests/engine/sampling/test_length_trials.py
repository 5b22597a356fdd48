"""Models whose logits depend on the total length, or that build masks of their own, at the lengths that are used."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from odp_callbacks.engine.gradients.logits import node_logits, response_logits
from odp_callbacks.engine.gradients.random_projection import projected_gram_matrices
from odp_callbacks.engine.gradients.vjp import node_gram_matrices, summed_vjps
from odp_callbacks.engine.sampling.backend_selection import BACKENDS, SELECTION, backend_of, depends_on_length
from odp_callbacks.engine.sampling.backends import prefill_rollouts
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.update.split_model import SplitModel
from odp_callbacks.functional import lora_gradients
from tests.helpers.continuations import sample
from tests.helpers.long_models import LONG_KINDS, fresh_greedy_tokens, fresh_logits, long_student, random_prompt
from tests.helpers.models import count_tokens, relative, tiny

NEW_TOKENS = 14
PROMPTS = [random_prompt(length) for length in (24, 28, 5, 40)]


@pytest.fixture(params=LONG_KINDS)
def long_model(request: pytest.FixtureRequest) -> nn.Module:
    return long_student(request.param)


def prefilled(model: nn.Module, prompts: list[torch.Tensor], max_new_tokens: int = NEW_TOKENS) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        return prefill_rollouts(model, [prompt[:-1] for prompt in prompts], max_new_tokens=max_new_tokens)


def requests_for(prompts: list[torch.Tensor]) -> list[ContinuationRequest]:
    return [
        ContinuationRequest(index, len(prompt) - 1, int(prompt[-1]), NEW_TOKENS) for index, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("planned_tokens", [NEW_TOKENS, 1], ids=["planned", "not planned"])
def test_continuations_are_those_of_the_full_forward(long_model: nn.Module, planned_tokens: int) -> None:
    """Also of a short prompt beside long ones, and where the continuations are longer than was said."""
    unused_model = copy.deepcopy(long_model)
    prefixes = prefilled(long_model, PROMPTS, planned_tokens)
    continuations = sample(long_model, prefixes, requests_for(PROMPTS), temperature=1e-5)
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        assert continuation.tokens == fresh_greedy_tokens(unused_model, prompt, NEW_TOKENS)


def test_only_what_crosses_the_length_is_sampled_slowly() -> None:
    model = long_student("long-rope")
    prefixes = prefilled(model, PROMPTS)
    assert (prefixes.backend, prefixes.uncached) == (BACKENDS[0], {0, 1, 3})
    beyond = [random_prompt(length) for length in (34, 36, 50)]
    prefixes = prefilled(model, beyond)
    assert (prefixes.backend, prefixes.uncached) == (BACKENDS[0], frozenset())
    continuations = sample(model, prefixes, requests_for(beyond), temperature=1e-5)
    for prompt, continuation in zip(beyond, continuations, strict=True):
        assert continuation.tokens == fresh_greedy_tokens(model, prompt, NEW_TOKENS)


def test_a_model_that_needs_full_forwards_logs_one_warning() -> None:
    model = long_student("long-rope")
    with pytest.warns(UserWarning, match="'full forward'.*slower and has the same distribution.*depend on the length"):
        prefill_rollouts(model, [PROMPTS[0]], max_new_tokens=NEW_TOKENS)
    prefill_rollouts(model, [PROMPTS[0]], max_new_tokens=NEW_TOKENS)


def test_logits_at_nodes_are_those_that_were_sampled_from(long_model: nn.Module) -> None:
    responses = [tuple(random_prompt(NEW_TOKENS).tolist())] * len(PROMPTS)
    depths = [[0, 3, 5, 9, 13]] * len(PROMPTS)
    sequences = [
        torch.cat([prompt, torch.tensor(response)]) for prompt, response in zip(PROMPTS, responses, strict=True)
    ]
    positions = [[len(prompt) - 1 + depth for depth in depths[0]] for prompt in PROMPTS]
    expected = [
        torch.stack([fresh_logits(long_model, sequence[: position + 1]) for position in of_sequence])
        for sequence, of_sequence in zip(sequences, positions, strict=True)
    ]
    split = SplitModel(long_model)
    with torch.no_grad():
        found = [
            response_logits(long_model, PROMPTS, responses, depths),
            node_logits(long_model, sequences, positions),
            split.logits(split.hidden_states(sequences, positions)).split(5),
        ]
    for way in found:
        for logits, of_prefixes in zip(way, expected, strict=True):
            assert relative(logits, of_prefixes) < 1e-5


def test_gradients_are_those_of_each_node_alone(long_model: nn.Module) -> None:
    sequence, positions = random_prompt(44), [20, 29, 31, 32, 38, 43]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(3, 12, generator=generator, dtype=torch.float64) for _ in positions]
    alone = [
        lora_gradients(long_model, sequence[: position + 1], torch.tensor([position]), of_node[None])[0]
        for position, of_node in zip(positions, cotangents, strict=True)
    ]
    for ends in (None, [33, 44]):
        grams = node_gram_matrices(long_model, sequence, positions, cotangents, ends=ends).grams
        for gram, gradients in zip(grams, alone, strict=True):
            assert relative(gram.sum(dim=0), gradients @ gradients.mT) < 1e-4
    sums = summed_vjps(long_model, sequence, positions, torch.stack(cotangents, dim=1))
    assert relative(sums, sum(alone).float()) < 1e-4
    projected = projected_gram_matrices(
        long_model, sequence, positions, cotangents, 3, torch.Generator().manual_seed(1)
    )
    for index, position in enumerate(positions):
        (of_node,) = projected_gram_matrices(
            long_model, sequence[: position + 1], [position], [cotangents[index]], 3, torch.Generator().manual_seed(1)
        )
        assert relative(projected[index], of_node) < 1e-4


def test_the_training_finds_its_position_embedding_as_it_was() -> None:
    """Dynamic scaling rotates by the longest sequence so far; a probe's must not count."""
    model = long_student("dynamic")
    ids = random_prompt(40)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with preserving_training_state(model):
            model(input_ids=random_prompt(60)[None])
        assert torch.equal(model(input_ids=ids).logits, before)


def test_one_trial_covers_all_shorter_sequences() -> None:
    model = tiny("llama", max_position_embeddings=256)
    assert backend_of(model, 5, 150) == BACKENDS[0]
    shapes: list[tuple[int, int]] = []
    stop = count_tokens(model, shapes)
    assert {backend_of(model, shortest, longest) for shortest, longest in ((1, 9), (20, 150), (100, 160))} == {
        BACKENDS[0]
    }
    stop()
    assert shapes == []
    assert max(longest for _, longest in _trial_shapes(model, 200)) <= 256


def _trial_shapes(model: nn.Module, longest: int) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    stop = count_tokens(model, shapes)
    SELECTION.verdict(model, 1, longest)
    stop()
    return shapes


def test_a_trial_stays_within_the_context() -> None:
    model = tiny("gpt2", max_position_embeddings=20)
    assert max(longest for _, longest in _trial_shapes(model, 18)) == 20


def test_whether_logits_depend_on_the_length_is_found_without_a_trial_of_backends() -> None:
    """A teacher only runs whole sequences."""
    model = tiny("llama", max_position_embeddings=256)
    shapes: list[tuple[int, int]] = []
    stop = count_tokens(model, shapes)
    assert not depends_on_length(model, 1, 70)
    assert [length for _, length in shapes if length > 1] == [2, 8, 32, 80]
    shapes.clear()
    assert not depends_on_length(model, 3, 80)
    assert not shapes
    stop()
    dynamic = long_student("dynamic")
    for _ in range(2):
        assert depends_on_length(dynamic, 1, 60)
        SELECTION.verdict(dynamic, 1, 60)  # what it finds is used, too
