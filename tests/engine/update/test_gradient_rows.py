"""Gradients and influences of batches against one plain backward per token."""

from typing import Any

import pytest
import torch
from torch import nn

from odp_callbacks.engine import AdapterTeacher, BaseTeacher, Teacher
from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.teachers import teacher_logits, teacher_prompt_ids
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.functional import lora_gradients, lora_parameters
from tests.helpers.models import Snapshot, paddable, relative, tiny, word_tokenizer

ROWS = [{"prompt": "a b", "answer": "c"}, {"prompt": "c", "answer": "d"}]
TEACHERS = {"answer": Teacher("{answer} {prompt}"), "base": BaseTeacher()}
TEMPERATURE = 0.7


def make_rollouts() -> list[Rollout]:
    first, second = as_questions(ROWS, word_tokenizer())
    return [
        Rollout(first, (6, 7, 8, 2), "a b c", False, 1.0),
        Rollout(first, (9,), "d", True, 0.0),
        Rollout(second, (10, 6), "e a", False, 0.0),
    ]


ADVANTAGES = [0.5, -0.5, 0.25]


def make_gradients(student: nn.Module, divergence: Any = "reverse_kl", **options: Any) -> UpdateGradients:
    direction = distillation_direction(divergence, options.get("beta"), options.get("top_k"), TEMPERATURE)
    return UpdateGradients(student, word_tokenizer(), TEACHERS, direction, TEMPERATURE)


def token_gradients(student: nn.Module, gradients: UpdateGradients) -> list[torch.Tensor]:
    """For each rollout ``(T, 1 + K, P)``: one plain backward for each token and direction."""
    tokenizer, rows = word_tokenizer(), []
    for rollout, advantage in zip(make_rollouts(), ADVANTAGES, strict=True):
        depths = range(len(rollout.response_ids))
        positions = torch.tensor(rollout.positions(depths))
        with torch.no_grad():
            logits = student(input_ids=rollout.sequence[None]).logits[0, positions]
        success = -torch.softmax(logits / TEMPERATURE, dim=-1)
        success[torch.arange(len(depths)), torch.tensor(rollout.response_ids)] += 1
        directions = [success * advantage / TEMPERATURE]
        for teacher in TEACHERS.values():
            prompt = teacher_prompt_ids(teacher, tokenizer, rollout.question)
            (theirs,) = teacher_logits(teacher, student, [prompt], [rollout.response_ids], [list(depths)])
            directions.append(gradients.direction(logits, theirs, torch.tensor(rollout.response_ids)))
        rows.append(lora_gradients(student, rollout.sequence, positions, torch.stack(directions, dim=1)))
    return rows


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "mistral"])
def test_rows_and_influences_equal_one_backward_for_each_token(family: str) -> None:
    student = paddable(family)
    # Root mean square norms are computed in float32, and Gemma's window needs a float32 model here.
    accuracy = {"gpt2": 1e-9, "gemma2": 1e-4}.get(family, 1e-6)
    gradients = make_gradients(student)
    assert gradients.model.splits
    expected = token_gradients(student, gradients)
    snapshot = Snapshot(student)
    rows, directions = gradients.rows(make_rollouts(), ADVANTAGES)
    flat = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
    assert relative(flat.double(), sum(row.double().sum(0) for row in expected)) < accuracy

    generator = torch.Generator().manual_seed(0)
    tangents = {
        name: torch.randn(2, *p.shape, generator=generator, dtype=torch.float64)
        for name, p in lora_parameters(student).items()
    }
    flat_tangents = torch.cat([tangent.flatten(1) for tangent in tangents.values()], dim=1)
    influences = gradients.influences(make_rollouts(), tangents, directions)
    exact = torch.cat([row[:, 1:].double() @ flat_tangents.mT for row in expected])  # (N, K, S)
    assert relative(influences, exact.permute(2, 1, 0)) < accuracy
    assert relative(gradients.influences(make_rollouts(), tangents), influences) < accuracy
    snapshot.check()


@pytest.mark.parametrize(
    ("divergence", "options"),
    [("forward_kl", {}), ("jsd", {"beta": 0.3}), ("sampled_token", {}), ("reverse_kl", {"top_k": 3})],
)
def test_every_loss_of_the_library(divergence: str, options: dict[str, Any]) -> None:
    student = tiny()
    gradients = make_gradients(student, divergence, **options)
    rows, _ = gradients.rows(make_rollouts(), ADVANTAGES)
    flat = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
    assert relative(flat, sum(row.sum(0) for row in token_gradients(student, gradients))) < 1e-6


def test_a_head_with_lora_of_its_own_belongs_to_the_body() -> None:
    from peft import LoraConfig, get_peft_model

    from tests.helpers.models import randomise, tiny_base

    student = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    student = randomise(student, "default", 0.3, 0).double().eval()
    gradients = make_gradients(student)
    assert not gradients.model.splits
    expected = token_gradients(student, gradients)
    rows, directions = gradients.rows(make_rollouts(), ADVANTAGES)
    flat = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
    assert relative(flat, sum(row.sum(0) for row in expected)) < 1e-6
    tangents = {name: p.detach()[None].clone() for name, p in lora_parameters(student).items()}
    flat_tangent = torch.cat([tangent.flatten() for tangent in tangents.values()])
    exact = torch.cat([row[:, 1:] @ flat_tangent for row in expected])  # (N, K)
    assert relative(gradients.influences(make_rollouts(), tangents, directions)[0], exact.T) < 1e-6


def test_logits_are_held_for_a_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from odp_callbacks.engine.update import split_model

    student = tiny()
    whole, _ = make_gradients(student).rows(make_rollouts(), ADVANTAGES)
    monkeypatch.setattr(split_model, "MAXIMUM_LOGITS", 25)  # two positions of 12 logits
    pieces, _ = make_gradients(student).rows(make_rollouts(), ADVANTAGES)
    for name, row in whole.items():
        torch.testing.assert_close(pieces[name], row)


def test_a_teacher_that_equals_the_student_has_no_direction() -> None:
    student: Any = tiny()
    student.add_adapter("copy", student.peft_config["default"])
    values = {name: p.detach() for name, p in student.named_parameters()}
    for name, value in values.items():
        if ".copy." in name:
            value.copy_(values[name.replace(".copy.", ".default.")])
    teachers = {"self": Teacher(), "copy": AdapterTeacher("copy")}
    direction = distillation_direction("reverse_kl", None, None, 1.0)
    rows, directions = UpdateGradients(student, word_tokenizer(), teachers, direction, 1.0).rows(
        make_rollouts(), ADVANTAGES
    )
    assert not directions.norms.any()
    assert all(not row[1:].any() for row in rows.values())


def exact_influences(student: nn.Module, gradients: UpdateGradients) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tangents along the parameters themselves, and the influences ``(K, N)`` by one backward for each token."""
    tangents = {name: p.detach()[None].clone() for name, p in lora_parameters(student).items()}
    flat_tangent = torch.cat([tangent.flatten() for tangent in tangents.values()])
    return tangents, torch.cat([row[:, 1:] @ flat_tangent for row in token_gradients(student, gradients)]).T


def test_hooks_for_gradient_checkpointing_are_taken_out_and_put_back(recwarn: pytest.WarningsRecorder) -> None:
    student: Any = tiny()
    gradients = make_gradients(student)
    tangents, exact = exact_influences(student, gradients)
    student.enable_input_require_grads()
    hooks = list(student.get_input_embeddings()._forward_hooks.items())
    assert hooks
    assert relative(gradients.influences(make_rollouts(), tangents)[0], exact) < 1e-6
    assert list(student.get_input_embeddings()._forward_hooks.items()) == hooks
    assert not [w for w in recwarn if "forward-mode" in str(w.message)]


def test_without_a_forward_mode_each_token_goes_back_on_its_own_and_that_is_said_once() -> None:
    class OnlyBackward(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    student: Any = tiny()
    gradients = make_gradients(student)
    tangents, exact = exact_influences(student, gradients)
    layer = student.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(lambda module, inputs, output: OnlyBackward.apply(output))
    with pytest.warns(UserWarning, match="one backward for each token"):
        first = gradients.influences(make_rollouts(), tangents)
    second = gradients.influences(make_rollouts(), tangents)  # a second warning would be an error here
    assert relative(first[0], exact) < 1e-6
    assert relative(second[0], exact) < 1e-6
