"""Gradients of the segments of a batch against autograd, and what keeps them from being told apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from tests.engine.update.test_gradient_rows import ADVANTAGES, make_gradients, make_rollouts, token_gradients
from tests.helpers.models import Snapshot, paddable, randomise, relative, tiny, tiny_base

SEGMENTS = [1, 0, 1]


def expected_rows(student: nn.Module, gradients: UpdateGradients) -> torch.Tensor:
    """``(2, 1 + K, P)``: one plain backward for each token and direction, summed over the tokens of a segment."""
    sums = [row.double().sum(dim=0) for row in token_gradients(student, gradients)]
    return torch.stack([sums[1], sums[0] + sums[2]])


def segment_rows(gradients: UpdateGradients) -> torch.Tensor:
    return gradients.segment_rows(make_rollouts(), ADVANTAGES, SEGMENTS)[0].double()


def with_lora(base: nn.Module, **options: Any) -> nn.Module:
    return randomise(get_peft_model(base, LoraConfig(r=2, **options)), "default", 0.3, 0).double().eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "mistral"])
def test_one_pass_gives_the_gradients_of_every_segment(family: str) -> None:
    student = paddable(family)
    gradients = make_gradients(student)
    snapshot = Snapshot(student)
    assert not gradients.no_segments
    # Root mean square norms are computed in float32, and Gemma's window needs a float32 model here.
    accuracy = {"gpt2": 1e-9, "gemma2": 1e-4}.get(family, 1e-6)
    assert relative(segment_rows(gradients), expected_rows(student, gradients)) < accuracy
    assert not any("forward" in module.__dict__ for module in student.modules())
    snapshot.check()


def test_a_layer_that_is_used_twice_and_biases_of_lora_count() -> None:
    base: Any = tiny_base(attention_bias=True, use_cache=False)  # a cache would mix up the two uses
    base.model.layers[1] = base.model.layers[0]
    student = with_lora(base, target_modules=["q_proj", "v_proj"], lora_bias=True)
    gradients = make_gradients(student)
    assert not gradients.no_segments
    assert relative(segment_rows(gradients), expected_rows(student, gradients)) < 1e-6


def test_directions_keep_the_order_of_the_rollouts() -> None:
    gradients = make_gradients(tiny())
    together = gradients.segment_rows(make_rollouts(), ADVANTAGES, SEGMENTS)[1]
    gradients.no_segments = "not now"
    apart = gradients.segment_rows(make_rollouts(), ADVANTAGES, SEGMENTS)[1]
    torch.testing.assert_close(together.cotangents, apart.cotangents)
    torch.testing.assert_close(together.norms, apart.norms)


def swapped_axes() -> nn.Module:
    student: Any = tiny()
    layer = student.get_base_model().model.layers[0].mlp.down_proj
    own = layer.forward
    layer.forward = lambda states: own(states.transpose(0, 1)).transpose(0, 1)
    return student  # type: ignore[no-any-return]


def flattened() -> nn.Module:
    student: Any = tiny()
    layer = student.get_base_model().model.layers[0].mlp.down_proj
    own = layer.forward
    layer.forward = lambda states: own(states.flatten(0, 1)).unflatten(0, states.shape[:2])
    return student  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make_student", "reason"),
    [
        (lambda: with_lora(tiny_base(), target_modules=["q_proj", "embed_tokens"]), "no weight of a linear layer"),
        (lambda: with_lora(tiny_base(), target_modules=["q_proj"], use_dora=True), "no weight of a linear layer"),
        (lambda: with_lora(tiny_base(), target_modules=["q_proj"], target_parameters=["o_proj.weight"]), "a parameter"),
        (swapped_axes, "shape"),
        (flattened, "shape"),
    ],
    ids=["embedding", "dora", "parameter", "swapped axes", "flattened"],
)
def test_other_layers_take_passes_for_each_segment(make_student: Callable[[], nn.Module], reason: str) -> None:
    student = make_student()
    gradients = make_gradients(student)
    assert reason in gradients.no_segments
    assert relative(segment_rows(gradients), expected_rows(student, gradients)) < 1e-6


def test_parameters_in_the_same_memory_take_passes_for_each_segment() -> None:
    student: Any = tiny()
    first, second = (layer.self_attn.q_proj for layer in student.get_base_model().model.layers)
    second.lora_A["default"].weight.data = first.lora_A["default"].weight.data
    gradients = make_gradients(student)
    assert "share their memory" in gradients.no_segments
    assert relative(segment_rows(gradients), expected_rows(student, gradients)) < 1e-6


def test_directions_that_are_zero_take_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, calls = make_gradients(tiny()), []
    own = torch.autograd.grad
    whole = segment_rows(gradients)
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or own(*a, **k))
    rows, _ = gradients.segment_rows(make_rollouts(), [0.0] * 3, SEGMENTS)
    assert not rows[:, 0].any()
    torch.testing.assert_close(rows[:, 1:].double(), whole[:, 1:])
    anchored = [call for call in calls if isinstance(call[1], list) and [leaf.dim() for leaf in call[1]] == [0]]
    assert len(anchored) == 2
