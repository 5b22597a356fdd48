import random

import numpy as np
import pytest
import torch

from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.teachers import Teacher
from odp_callbacks.engine.training_state import preserving_training_state
from tests.helpers.models import tiny


def draws():
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002 (the stream that users use)


@pytest.mark.parametrize("fails", [False, True])
def test_random_streams_and_modes_are_put_back(fails):
    first, second = tiny(dropout=0.5), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    first.train()
    modes = [m.training for model in (first, second) for m in model.modules()]
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError) if fails else torch.enable_grad(), preserving_training_state():
        expected = draws()
        if fails:
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError) if fails else torch.enable_grad(), preserving_training_state(first, second):
        assert not any(m.training for model in (first, second) for m in model.modules())
        assert draws() == expected
        if fails:
            raise ZeroDivisionError
    assert draws() == expected
    assert [m.training for model in (first, second) for m in model.modules()] == modes


@pytest.mark.parametrize("is_cached_before", [True, False])
def test_casts_of_autocasting_stay_valid_and_none_is_added(is_cached_before):
    layer, states = torch.nn.Linear(3, 3), torch.ones(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(states).detach() if is_cached_before else None
        with preserving_training_state(), torch.enable_grad():
            first = layer(states).detach()
            with torch.no_grad():
                layer.weight.add_(1.0)
            assert not torch.equal(layer(states).detach(), first), "the weights of the moment are read"
        assert torch.is_autocast_cache_enabled()
        # The cache shows that it is as it was: it still has the cast that was made before, or none.
        assert not is_cached_before or torch.equal(layer(states), before)
        assert is_cached_before or not torch.equal(layer(states), first)


def test_a_probe_within_autocasting_leaves_the_step_bit_for_bit(tokenizer):
    def gradients(with_probe):
        student = tiny().float()
        probe = Probe(student, tokenizer, lambda prompts, completions, **_: [0.5] * len(completions), "base",
                      ProbeConfig(max_new_tokens=3, rollouts_per_question=2, nodes=1))  # fmt: skip
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(2):  # before the first forward of the training, and between forward and backward
                if with_probe:
                    probe.run([{"prompt": "a b"}])
                loss = student(torch.tensor([[1, 6, 7]])).logits.float().square().sum()
        loss.backward()
        return [parameter.grad for parameter in student.parameters() if parameter.requires_grad]

    assert all(torch.equal(one, other) for one, other in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradients_are_off_but_can_be_had(outside):
    with outside():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with preserving_training_state():
            assert not torch.is_grad_enabled()
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                (2 * x).backward()
            assert x.grad == 2
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


class Counter:
    """A backend for ``torch.compile`` that counts what it is asked to compile, and compiles nothing."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def compiled_whole(model, backend):
    return torch.compile(model, backend=backend)


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


def compiled_layers(model, backend):
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=backend)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo itself
@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_layers])
def test_a_compiled_student_is_measured_like_any_other_and_stays_compiled(compiled, tokenizer):
    def measure(student):
        probe = Probe(
            student,
            tokenizer,
            lambda prompts, completions, **_: [float("a" in c) for c in completions],
            {"base": "base", "self": Teacher("a {prompt}")},
            ProbeConfig(max_new_tokens=4, continuations=2),
        )
        return probe.run([{"prompt": "a b"}, {"prompt": "c"}])

    def step():
        student(input_ids=torch.tensor([[1, 6, 7, 8]]), use_cache=False).logits.sum().backward()

    torch._dynamo.reset()
    backend = Counter()
    student = compiled(tiny(), backend)
    step()
    graphs = backend.graphs
    assert graphs
    expected = measure(tiny())
    found = measure(student)
    step()
    assert backend.graphs == graphs
    assert len(found.nodes) == len(expected.nodes)
    for a, b in zip(found.nodes, expected.nodes, strict=True):
        np.testing.assert_array_equal(a.gram, b.gram)
        np.testing.assert_array_equal(a.total, b.total)
