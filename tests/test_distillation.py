"""The LightningModule for on-policy distillation."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from odp_callbacks import AdapterTeacher, BaseTeacher, EMATeacher, ModelTeacher, OnPolicyDistillation, Teacher
from odp_callbacks.distillation import TokenLosses
from odp_callbacks.functional import distillation_loss
from odp_callbacks.gates import IncorrectRolloutGate, Tokens
from tests.helpers.models import tiny, word_tokenizer

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
    taken = module.token_losses(rollouts)
    losses, mask = taken.losses, taken.mask
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
            taken = module.token_losses(module.sample(ROWS * 8))
        return float(taken.losses.sum() / taken.mask.sum())

    before = distance()
    trainer = Trainer(
        max_steps=40, max_epochs=100, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ROWS, batch_size=4, collate_fn=list))
    assert distance() < 0.7 * before


def loss_of(module: OnPolicyDistillation) -> tuple[Tensor, dict[str, float]]:
    """The loss of one training step on sampled rollouts, and what it logs."""
    torch.manual_seed(2)
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    module.log_dict = lambda found, **_: logged.update(found)  # type: ignore[method-assign]
    return module.training_step(ROWS, 0), logged


def contains(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def test_a_gate_weighs_tokens_and_the_loss_keeps_its_scale() -> None:
    plain, _ = loss_of(make().eval())
    doubled, logged = loss_of(make(gate=lambda tokens: 2 * torch.ones(len(tokens))).eval())
    torch.testing.assert_close(doubled, plain)
    assert logged["train/gate/token_share"] == 1
    assert logged["train/gate/loss_before"] == pytest.approx(logged["train/gate/loss_after"])
    first, _ = loss_of(make(gate=lambda tokens: (tokens.depth == 0).float()).eval())
    torch.manual_seed(2)
    module = make().eval()
    taken = module.token_losses(module.sample(ROWS))
    torch.testing.assert_close(first, taken.losses[:, 0].mean())
    nothing, logged = loss_of(make(gate=lambda tokens: torch.zeros(len(tokens))).eval())
    assert nothing == 0
    nothing.backward()
    assert logged["train/gate/token_share"] == 0


def test_the_gate_sees_what_the_policies_say() -> None:
    seen: list[Tokens] = []

    def gate(tokens: Tokens) -> Tensor:
        seen.append(tokens)
        return torch.ones(len(tokens))

    module = make("{answer} {prompt}", gate=gate, reward=contains, temperature=0.7, rollouts_per_prompt=2).eval()
    loss_of(module)
    torch.manual_seed(2)
    rollouts = module.sample(ROWS)
    tokens, place = seen[-1], 0
    for index, rollout in enumerate(rollouts):
        ids = torch.tensor(rollout.response_ids)
        here = slice(place, place := place + len(ids))
        own = module.student(input_ids=rollout.sequence[None]).logits[0, -len(ids) - 1 : -1] / 0.7
        policy = torch.distributions.Categorical(logits=own)
        torch.testing.assert_close(tokens.student_entropy[here], policy.entropy(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens.student_log_prob[here], policy.log_prob(ids), rtol=1e-4, atol=1e-5)
        assert tokens.rollout[here].tolist() == [index] * len(ids)
        assert tokens.correct[here].tolist() == [rollout.reward >= 1] * len(ids)
        siblings = [r.reward for r in rollouts if r.question is rollout.question]
        assert tokens.pass_rate[here].tolist() == pytest.approx([sum(siblings) / 2] * len(ids))
    # The loss is the reverse KL, and the teacher's side of it is seen as well.
    losses = module.token_losses(rollouts)
    torch.testing.assert_close(tokens.reverse_kl, losses.losses[losses.mask.bool()].detach(), rtol=1e-4, atol=1e-5)


class Halves:
    """Routes even depths to the first teacher and odd ones to the second."""

    def __call__(self, tokens: Tokens) -> Tensor:
        return torch.ones(len(tokens))

    def route(self, tokens: Tokens) -> Tensor:
        return tokens.depth % 2


def test_each_token_is_taught_by_the_teacher_that_the_gate_chose() -> None:
    teachers = {"base": BaseTeacher(), "told": Teacher("{answer} {prompt}")}

    def losses(teacher: Any, gate: Any = None) -> TokenLosses:
        module = make(teacher, gate=gate).eval()
        torch.manual_seed(3)
        return module.token_losses(module.sample(ROWS))

    both, base, told = losses(teachers, Halves()), losses(BaseTeacher()), losses(teachers["told"])
    torch.testing.assert_close(both.losses[:, ::2], base.losses[:, ::2])
    torch.testing.assert_close(both.losses[:, 1::2], told.losses[:, 1::2])
    assert not torch.allclose(base.losses, told.losses)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("`gate` needs 'correct' of every token", {"gate": IncorrectRolloutGate()}),
        ("`gate` chooses none of them", {"teacher": {"a": BaseTeacher(), "b": Teacher("{answer} {prompt}")}}),
        ("one weight for each of the 5 tokens", {"gate": lambda tokens: torch.ones(3)}),
        ("finite and not negative", {"gate": lambda tokens: -torch.ones(len(tokens))}),
        ("`gate` must be a function", {"gate": 3}),
    ],
)
def test_a_gate_of_no_use_is_refused_at_once(match: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        make(**options)


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
