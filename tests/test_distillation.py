"""The LightningModule for on-policy distillation."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from conftest import tiny, word_tokenizer
from odp_callbacks import AdapterTeacher, BaseTeacher, EMATeacher, ModelTeacher, OnPolicyDistillation, Teacher
from odp_callbacks.functional import distillation_loss

ROWS = [{"prompt": p, "answer": a} for p, a in zip(("a b", "c a f", "b", "d c"), "abcd", strict=True)]


def make(teacher: Any = None, **changes: Any) -> OnPolicyDistillation:
    options = {"max_new_tokens": 6, "learning_rate": 3e-2}
    return OnPolicyDistillation(
        tiny("llama").float().train(), word_tokenizer(), teacher or "base", **(options | changes)
    )


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        ("reverse_kl", {}),
        ("forward_kl", {"top_k": 3}),
        ("jsd", {"beta": 0.3}),
        ("sampled_token", {}),
    ],
)
def test_losses_in_a_padded_batch_are_those_of_single_sequences(divergence: Any, options: dict[str, Any]) -> None:
    module = make("{answer} {prompt}", divergence=divergence, temperature=0.7, **options).eval()
    torch.manual_seed(3)
    rollouts = module.sample(ROWS)
    losses, mask = module.token_losses(rollouts)
    assert len({len(r.response_ids) for r in rollouts}) > 1
    for row, rollout in enumerate(rollouts):
        length = len(rollout.response_ids)
        assert mask[row].tolist() == [1.0] * length + [0.0] * (mask.shape[1] - length)
        assert losses[row, length:].abs().sum() == 0
        own = module.student(input_ids=rollout.sequence[None]).logits[0, -length - 1 : -1]
        shown = module.tokenizer(f"{rollout.question.row['answer']} {rollout.question.row['prompt']}")["input_ids"]
        ids = torch.tensor([[*shown, *rollout.response_ids]])
        taught = module.student(input_ids=ids).logits[0, -length - 1 : -1]
        tokens = torch.tensor(rollout.response_ids) if divergence == "sampled_token" else None
        expected = distillation_loss(own, taught, divergence, tokens=tokens, temperature=0.7, **options)
        torch.testing.assert_close(losses[row, :length], expected, rtol=1e-4, atol=1e-5)


def test_the_student_learns_to_follow_its_teacher() -> None:
    torch.manual_seed(0)
    module = make(ModelTeacher(tiny("llama", seed=1).float()))

    def distance() -> float:
        torch.manual_seed(7)
        with torch.no_grad():
            losses, mask = module.token_losses(module.sample(ROWS * 8))
        return float(losses.sum() / mask.sum())

    before = distance()
    trainer = Trainer(
        max_steps=40, max_epochs=100, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ROWS, batch_size=4, collate_fn=list))
    assert distance() < 0.7 * before


def test_weights_per_rollout_and_per_token_scale_the_loss() -> None:
    def loss(weights: Any) -> Tensor:
        torch.manual_seed(2)
        module = make(weights=weights).eval()
        module.log = lambda *args, **keywords: None  # type: ignore[method-assign]
        return module.training_step(ROWS, 0)

    plain = loss(None)
    torch.testing.assert_close(loss(lambda rollouts: [2.0] * len(rollouts)), 2 * plain)
    assert loss(lambda rollouts: torch.zeros(len(rollouts), max(len(r.response_ids) for r in rollouts))) == 0
    with pytest.raises(ValueError, match="`weights` must give 4 weights"):
        loss(lambda rollouts: [1.0])


def test_weights_see_the_rewards() -> None:
    seen = []
    module = make(
        reward=lambda prompts, completions, answer: [float(a in c) for c, a in zip(completions, answer, strict=True)],
        weights=lambda rollouts: seen.extend(r.reward for r in rollouts) or [1.0] * len(rollouts),
    )
    module.log = lambda *args, **keywords: None  # type: ignore[method-assign]
    module.training_step(ROWS, 0)
    assert set(seen) <= {0.0, 1.0}
    assert len(seen) == 4


@pytest.mark.parametrize("teacher", [Teacher("{answer} {prompt}"), BaseTeacher(), EMATeacher(0.9), AdapterTeacher("t")])
def test_the_teacher_gets_no_gradient_and_the_student_keeps_its_adapter(teacher: Any) -> None:
    student = tiny("llama").float().train()
    student.add_adapter("t", student.peft_config["default"])
    module = OnPolicyDistillation(student, word_tokenizer(), teacher, max_new_tokens=4)
    module.log = lambda *args, **keywords: None  # type: ignore[method-assign]
    module.on_train_start = lambda: None  # type: ignore[method-assign]
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    module.training_step(ROWS, 0).backward()
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(".default." in name for name in with_gradient)
    assert student.active_adapter == "default"


def test_rollouts_are_sampled_without_dropout_and_training_mode_comes_back() -> None:
    module = make().train()
    modes = []
    module.student.get_base_model().register_forward_pre_hook(lambda m, _: modes.append(m.training))
    module.sample(ROWS)
    assert modes
    assert not any(modes)
    assert all(m.training for m in module.student.modules())
