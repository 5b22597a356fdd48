import pytest
import torch

from odp_callbacks.engine.gradients.logits import node_logits, response_logits
from odp_callbacks.engine.sampling.backends import backend_of
from odp_callbacks.engine.sampling.prefix_cache import vocabulary_size
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import count_tokens, paddable, randomise, tiny, tiny_base

SEQUENCES = [torch.tensor(s) for s in ([1, 6, 7, 8, 9, 10, 11], [1, 5], [1, 7, 7, 9, 10])]
POSITIONS = [[6, 2], [0], [4, 0, 1]]


@pytest.mark.parametrize("most", [2**26, 12 * 5, 1])
def test_equal_those_of_each_sequence_alone(family, most):
    model = paddable(family)
    with torch.no_grad():
        found = node_logits(model, SEQUENCES, POSITIONS, most_elements=most)
        for logits, ids, at in zip(found, SEQUENCES, POSITIONS, strict=True):
            torch.testing.assert_close(logits, model(input_ids=ids[None]).logits[0, at], rtol=1e-5, atol=1e-5)


def test_batches_hold_no_more_logits_than_asked(student):
    for most, expected in ((2**26, 1), (12 * 6, 2), (1, 3)):
        shapes = []
        stop = count_tokens(student, shapes)
        node_logits(student, SEQUENCES, POSITIONS, most_elements=most)
        stop()
        assert len(shapes) == expected
    assert node_logits(student, [], []) == []


def test_other_parameters(student):
    other = randomise(tiny(), "default", 0.2, 9)
    found = node_logits(student, SEQUENCES, POSITIONS, dict(lora_parameters(other)))
    for a, b in zip(found, node_logits(other, SEQUENCES, POSITIONS), strict=True):
        assert torch.equal(a, b)


def test_vocabulary_size(student):
    assert vocabulary_size(student) == 12
    assert vocabulary_size(tiny_base("gpt2", vocabulary=17)) == 17

    class Bare(torch.nn.Module):
        config = student.config

    assert vocabulary_size(Bare()) == 12


def test_responses_to_equal_prompts_share_them(family):
    model = paddable(family)
    assert backend_of(model) == "shared prefix"
    prompts = [SEQUENCES[0], SEQUENCES[2], SEQUENCES[0], SEQUENCES[0][:1]]
    responses, depths = [[5, 6, 7, 8, 9, 10], [9, 9], [10], [6, 5, 6]], [[5, 0, 2], [1], [0], [1, 2]]
    shapes = []
    stop = count_tokens(model, shapes)
    with torch.no_grad():
        found = response_logits(model, prompts, responses, depths)
        stop()
        assert shapes == [(3, 6), (4, 6)], "three prompts, then all responses up to their last node"
        for logits, p, r, d in zip(found, prompts, responses, depths, strict=True):
            ids = torch.cat([p, torch.tensor(r)])
            expected = model(input_ids=ids[None]).logits[0, [len(p) - 1 + t for t in d]]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert response_logits(model, [], [], []) == []
