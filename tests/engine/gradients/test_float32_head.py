"""Logits at nodes come from a head in float32, and only the body rounds."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from odp_callbacks.engine.gradients import float32_head as module
from odp_callbacks.engine.gradients.float32_head import float32_head, float32_product
from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.teachers import BaseTeacher, teacher_logits
from tests.helpers.models import Snapshot, tiny, tiny_base
from tests.helpers.probes import measure

LARGE = {"vocabulary": 1000, "initializer_range": 0.8, "hidden_size": 64, "tie_word_embeddings": False}
"""Logits of size 16 and more, as those of real students are."""
PROMPTS, RESPONSES, DEPTHS = [torch.tensor([1, 6, 7, 8])], [[9, 10, 6, 7, 8, 9]], [[0, 2, 5]]


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        (logits,) = response_logits(model, PROMPTS, RESPONSES, DEPTHS)
    return logits


def hidden_states(model: nn.Module) -> torch.Tensor:
    """The hidden states that the head gets at the nodes."""
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    logits_of(model)
    handle.remove()
    return seen[-1][0]


def total_variation(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """The mean over nodes."""
    probabilities, expected = (one.double().softmax(dim=-1) for one in (logits, exact))
    return float((probabilities - expected).abs().sum(dim=-1).mean() / 2)


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return tiny(**LARGE).bfloat16().eval()


def test_total_variation_to_an_exact_head_is_that_of_float32(
    student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = hidden_states(student).double() @ student.get_output_embeddings().weight.double().T
    found = logits_of(student)
    assert found.dtype == torch.float32
    assert exact.abs().max() > 16
    assert total_variation(found, exact) < 1e-6
    monkeypatch.setattr(module, "_plain_head", lambda model: None)
    before = logits_of(student)
    assert before.dtype == torch.bfloat16
    assert total_variation(before, exact) > 1e-3, "what rounding to bfloat16 does"


def test_weights_are_cast_in_chunks(student: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = logits_of(student)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 64 * 300)
    sizes: list[int] = []
    own = torch.Tensor.to

    def counting(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        sizes.append(tensor.numel() if tensor.dim() == 2 else 0)
        return own(tensor, *arguments, **options)  # type: ignore[call-overload, no-any-return]  # passed on

    monkeypatch.setattr(torch.Tensor, "to", counting)
    torch.testing.assert_close(logits_of(student), whole)
    assert max(sizes) == 64 * 300


def test_a_teacher_that_equals_the_student_has_its_bits() -> None:
    student = tiny(**LARGE).bfloat16().eval()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    (of_teacher,) = teacher_logits(BaseTeacher(), student, PROMPTS, RESPONSES, DEPTHS)
    assert of_teacher.dtype == torch.float32
    assert torch.equal(of_teacher, logits_of(student))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_what_follows_the_head_is_done_to_its_logits(family: str) -> None:
    """Soft-capping, for example: in exact arithmetic the block changes nothing."""
    model = tiny_base(family).float().eval()
    expected = logits_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), float32_head(model):
        assert model(torch.tensor([[1, 6]])).logits.dtype == torch.float32
    half = model.bfloat16()
    assert total_variation(logits_of(half), expected) < 0.05


def test_lora_on_the_head_is_added_in_float32() -> None:
    base = tiny_base(**LARGE).float()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).bfloat16().eval()
    head = model.get_output_embeddings()
    found = logits_of(model)
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits_of(model)
    handle.remove()
    hidden, weight = seen[-1][0], head.get_base_layer().weight.detach().double()
    down, up = (matrix["default"].weight.detach() for matrix in (head.lora_A, head.lora_B))
    exact = hidden.double() @ (weight + head.scaling["default"] * (up.double() @ down.double())).T
    assert found.dtype == torch.float32
    plain = hidden.double() @ weight.T
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.02 * float((exact - plain).abs().max()))


def test_heads_that_are_no_plain_layer_of_this_process_compute_as_they_are() -> None:
    class Quantised(nn.Linear):
        pass

    model = tiny_base().bfloat16()
    model.lm_head = Quantised(16, 12, bias=False, dtype=torch.bfloat16)
    assert logits_of(model).dtype == torch.bfloat16
    assert logits_of(tiny_base().double()).dtype == torch.float64


def test_gradients_and_biases_pass_through() -> None:
    head, hidden = nn.Linear(4, 7, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda states: float32_product(states, head), hidden)
    torch.testing.assert_close(float32_product(hidden, head), head(hidden))


def test_a_probe_in_half_precision_leaves_the_student_as_it_was() -> None:
    student = tiny().bfloat16()
    snapshot = Snapshot(student)
    report = measure(student, "base", rows=[{"prompt": "a b", "answer": "c"}], nodes=2, max_new_tokens=4)
    snapshot.check()
    assert report.nodes
    assert "forward" not in student.get_output_embeddings().__dict__
