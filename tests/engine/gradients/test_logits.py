import pytest
import torch

from odp_callbacks.engine.gradients.logits import node_logits, response_logits
from odp_callbacks.engine.sampling.backend_selection import backend_of
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import count_tokens, paddable, randomise, tiny, tiny_base

SEQUENCES = [torch.tensor(s) for s in ([1, 6, 7, 8, 9, 10, 11], [1, 5], [1, 7, 7, 9, 10])]
POSITIONS = [[6, 2], [0], [4, 0, 1]]


@pytest.mark.parametrize("max_elements", [2**26, 12 * 5, 1])
def test_logits_equal_those_of_each_sequence_alone(family, max_elements):
    model = paddable(family)
    with torch.no_grad():
        all_logits = node_logits(model, SEQUENCES, POSITIONS, max_elements=max_elements)
        for logits, ids, positions in zip(all_logits, SEQUENCES, POSITIONS, strict=True):
            torch.testing.assert_close(logits, model(input_ids=ids[None]).logits[0, positions], rtol=1e-5, atol=1e-5)


def test_batches_hold_at_most_max_elements_logits(student):
    for max_elements, expected in ((2**26, 1), (12 * 6, 2), (1, 3)):
        shapes = []
        stop = count_tokens(student, shapes)
        node_logits(student, SEQUENCES, POSITIONS, max_elements=max_elements)
        stop()
        assert len(shapes) == expected
    assert node_logits(student, [], []) == []


def test_parameters_can_be_replaced(student):
    other = randomise(tiny(), "default", 0.2, 9)
    replaced = node_logits(student, SEQUENCES, POSITIONS, dict(lora_parameters(other)))
    for a, b in zip(replaced, node_logits(other, SEQUENCES, POSITIONS), strict=True):
        assert torch.equal(a, b)


def test_vocabulary_size_with_and_without_output_embeddings(student):
    assert vocabulary_size(student) == 12
    assert vocabulary_size(tiny_base("gpt2", vocabulary=17)) == 17

    class Bare(torch.nn.Module):
        config = student.config

    assert vocabulary_size(Bare()) == 12


def test_equal_prompts_are_computed_once(family):
    model = paddable(family)
    assert backend_of(model) == "shared prefix"
    prompts = [SEQUENCES[0], SEQUENCES[2], SEQUENCES[0], SEQUENCES[0][:1]]
    responses, depths = [[5, 6, 7, 8, 9, 10], [9, 9], [10], [6, 5, 6]], [[5, 0, 2], [1], [0], [1, 2]]
    shapes = []
    stop = count_tokens(model, shapes)
    with torch.no_grad():
        all_logits = response_logits(model, prompts, responses, depths)
        stop()
        assert shapes == [(3, 6), (4, 6)], "three prompts, then all responses up to their last node"
        for logits, prompt, response, of_response in zip(all_logits, prompts, responses, depths, strict=True):
            ids = torch.cat([prompt, torch.tensor(response)])
            expected = model(input_ids=ids[None]).logits[0, [len(prompt) - 1 + depth for depth in of_response]]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert response_logits(model, [], [], []) == []
