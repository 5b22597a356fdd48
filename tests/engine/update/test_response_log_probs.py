"""Log-probabilities of responses against one plain forward pass for each."""

import pytest
import torch
from torch import Tensor, nn

from odp_callbacks.engine.prompts import as_questions
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.update import batches, split_model
from odp_callbacks.engine.update.response_log_probs import response_log_probs
from odp_callbacks.engine.update.split_model import SplitModel
from odp_callbacks.functional import lora_parameters
from tests.helpers.models import tiny, word_tokenizer

PROMPTS = ("a b", "c", "b a d", "d c a f b")


def make_rollouts() -> list[Rollout]:
    questions = as_questions([{"prompt": prompt} for prompt in PROMPTS], word_tokenizer())
    return [
        Rollout(questions[i % 4], tuple(6 + (i + depth) % 6 for depth in range(1 + i % 3)), "", False, 0.0)
        for i in range(7)
    ]


def plain(student: nn.Module, rollout: Rollout, temperature: float) -> Tensor:
    length = len(rollout.response_ids)
    with torch.no_grad():
        logits = student(input_ids=rollout.sequence[None]).logits[0, -length - 1 : -1]
    of_all = torch.log_softmax(logits / temperature, dim=-1)
    return torch.stack([of_all[depth, token] for depth, token in enumerate(rollout.response_ids)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_they_are_those_of_single_sequences(family: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", {"cpu": 20})
    monkeypatch.setattr(split_model, "MAXIMUM_LOGITS", 40)
    student, rollouts = tiny(family), make_rollouts()
    tolerance = 1e-4 if family == "gemma2" else 1e-9  # Gemma's softmax is in float32
    for found, rollout in zip(response_log_probs(SplitModel(student), rollouts, temperature), rollouts, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, plain(student, rollout, temperature), rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_parameters_take_the_place_of_the_student_s(family: str) -> None:
    student, rollouts = tiny(family), make_rollouts()
    model = SplitModel(student)
    earlier = {name: value.detach() + 0.1 for name, value in lora_parameters(student).items()}
    found = response_log_probs(model, rollouts, 1.0, earlier)
    own = response_log_probs(model, rollouts, 1.0)
    assert max(float((a - b).abs().max()) for a, b in zip(found, own, strict=True)) > 1e-3
    for name, value in lora_parameters(student).items():
        value.data.copy_(earlier[name])
    for log_probs, rollout in zip(found, rollouts, strict=True):
        torch.testing.assert_close(log_probs, plain(student, rollout, 1.0), rtol=0, atol=1e-9)


def test_each_token_goes_through_the_model_once() -> None:
    student, rollouts = tiny("llama"), make_rollouts()
    model = SplitModel(student)
    seen: list[tuple[int, int]] = []
    layer = student.get_base_model().model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    response_log_probs(model, rollouts, 1.0)
    handle.remove()
    lengths = [len(rollout.sequence) - 1 for rollout in rollouts]
    assert seen == [(len(rollouts), max(lengths))]
