"""A gate in TRL's trainers."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from odp_callbacks import AlignmentGate, IncorrectRolloutGate, TeacherRouter, gate_trainer
from odp_callbacks.gates import Tokens
from odp_callbacks.gates.rules import everything, high_entropy, position
from tests.helpers.models import tiny_base
from tests.helpers.trainers import (
    add_callback,
    distillation_trainer,
    gkd_trainer,
    plain_trainer,
    sft_trainer,
    trainer_end_state,
)
from tests.helpers.training import ROWS, odd

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(params=[distillation_trainer, gkd_trainer], ids=["DistillationTrainer", "GKDTrainer"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def trained(trainer: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    trainer.train()
    return trainer_end_state(trainer), trainer.state.log_history


def careful(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c.split()) % 2) for c in completions]


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}])
def test_a_gate_that_is_open_changes_no_bit(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    plainly, logs = trained(make(tmp_path, **changes))
    trainer = make(tmp_path, **changes)
    gate_trainer(trainer, everything, careful)
    gated, gated_logs = trained(trainer)
    for name, value in plainly.items():
        assert torch.equal(value, gated[name]), name
    for row, other in zip(logs[:-1], gated_logs[:-1], strict=True):
        assert row["loss"] == other["loss"]
        assert other["gate/token_share"] == other["gate/rollout_share"] == other["gate/effective_share"] == 1
        if make is distillation_trainer and not changes:  # TRL's GKD divides by the tokens of the dataset's answers
            assert other["gate/loss_before"] == pytest.approx(other["loss"], rel=1e-5)
        assert other["gate/loss_after"] == other["gate/loss_before"]


def test_the_loss_is_the_weighted_mean_of_trl_s_own_terms(make: Any, tmp_path: Path) -> None:
    """Against the gradient of each token alone, which a gate lets through one by one."""
    seen: list[Tokens] = []

    def only(place: int | None, tokens: Tokens) -> Tensor:
        seen.append(tokens)
        weights = torch.ones_like(tokens.counts)
        return weights if place is None else weights * (torch.arange(len(tokens)) == place)

    def loss(gate: Any) -> tuple[float, Tensor]:
        trainer = make(tmp_path, max_steps=1, max_grad_norm=1e9, optim="sgd", learning_rate=1.0)
        before = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        gate_trainer(trainer, gate, careful)
        trainer.train()
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        return trainer.state.log_history[0]["loss"], before - after

    _, whole = loss(partial(only, None))
    count = len(seen[-1])
    weights = torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.1
    each = [loss(partial(only, place))[1] for place in range(count)]
    torch.testing.assert_close(torch.stack(each).mean(dim=0), whole, rtol=1e-3, atol=1e-6)
    _, mixed = loss(lambda tokens: weights if len(tokens) == count else tokens.counts)
    expected = (torch.stack(each) * (weights / weights.sum())[:, None]).sum(dim=0)
    torch.testing.assert_close(mixed, expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(mixed, whole, rtol=1e-2)


def test_incorrect_rollouts_alone(make: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path, per_device_train_batch_size=4)
    seen: list[Tokens] = []

    class Watched(IncorrectRolloutGate):
        def __call__(self, tokens: Tokens) -> Tensor:
            seen.append(tokens)
            return super().__call__(tokens)

    gate_trainer(trainer, Watched(), careful)
    _, logs = trained(trainer)
    seen = seen[-4:]
    for tokens, row in zip(seen, logs, strict=False):
        correct = tokens.need("correct")
        assert torch.equal(correct, tokens.need("reward") == 1)
        assert row["gate/token_share"] == pytest.approx(float((~correct).float().mean()))
    assert any(0 < row["gate/token_share"] < 1 for row in logs[:-1])


def test_rewards_get_the_rows_that_the_rollouts_answer(tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        asked.extend(zip(prompts, answer, strict=True))
        return careful(prompts, completions)

    trainer = distillation_trainer(tmp_path)
    gate_trainer(trainer, IncorrectRolloutGate(), reward)
    trainer.train()
    assert set(asked) == {(row["prompt"], row["answer"]) for row in ROWS}

    referred: list[tuple[Any, ...]] = []

    def by_reference(prompts: list[str], completions: list[str], reference: list[str]) -> list[float]:
        referred.extend(zip(prompts, reference, strict=True))
        return careful(prompts, completions)

    other = gkd_trainer(tmp_path)
    gate_trainer(other, IncorrectRolloutGate(), by_reference)
    other.train()
    assert {answer.split()[0] for _, answer in referred} == set("abcd")
    for prompt, answer in set(referred):
        assert any(row["prompt"] in prompt and row["answer"] in answer for row in ROWS)


def test_policies_are_those_of_the_models(make: Any, tmp_path: Path) -> None:
    """Entropies that a gate sees, against two forwards of our own on what the trainer trained on."""
    seen: list[tuple[Tokens, dict[str, Tensor]]] = []
    trainer = make(tmp_path, max_steps=1, per_device_train_batch_size=4)
    batches: list[dict[str, Any]] = []
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        batches.append(inputs)
        return original(model, inputs, **options)

    trainer.compute_loss = compute_loss
    teacher = tiny_base(seed=5).float()

    def gate(tokens: Tokens) -> Tensor:
        if batches:
            seen.append((tokens, batches[-1]))
        return high_entropy(tokens)

    gate_trainer(trainer, gate)
    student = make(tmp_path).model
    trainer.train()
    tokens, batch = seen[-1]
    if "completion_ids" in batch:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        wanted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1)[:, 1:].bool()
    else:
        ids, mask, wanted = batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:] != -100
    with torch.no_grad():
        for model, name in ((student, "student_entropy"), (teacher, "teacher_entropy")):
            p = torch.softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1][wanted], dim=-1)
            entropy = -(p * p.log()).sum(dim=-1)
            torch.testing.assert_close(getattr(tokens, name), entropy, rtol=1e-4, atol=1e-5)


def test_a_gate_learns_from_the_callback_s_probes(make: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    gate = AlignmentGate()
    gate_trainer(trainer, gate, careful, teacher="base")
    add_callback(trainer)
    trainer.train()
    assert gate.evidence.teachers == ("answer", "base")
    assert any("odp/gate/base/incorrect" in row for row in trainer.state.log_history)
    misnamed = make(tmp_path)
    gate_trainer(misnamed, AlignmentGate(), careful, teacher="other")
    with pytest.raises(ValueError, match="'other' teaches; name them alike"):
        add_callback(misnamed)


def test_a_failing_reward_or_gate_is_said_once_and_such_batches_are_not_gated(make: Any, tmp_path: Path) -> None:
    def broken(*args: Any, **columns: Any) -> Any:
        raise RuntimeError("out of order")

    plainly, _ = trained(make(tmp_path))
    trainer = make(tmp_path)
    gate_trainer(trainer, IncorrectRolloutGate(), broken)
    with pytest.warns(UserWarning, match="`reward` failed, and a batch was not gated: RuntimeError") as said:
        gated, logs = trained(trainer)
    assert len([w for w in said if "out of order" in str(w.message)]) == 1
    assert all(torch.equal(value, gated[name]) for name, value in plainly.items())
    assert not any("gate/token_share" in row for row in logs)

    trainer, calls = make(tmp_path), []

    def later(tokens: Tokens) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of order")
        return tokens.counts

    gate_trainer(trainer, later)
    with pytest.warns(UserWarning, match="`gate` failed"):
        trainer.train()
    strict = make(tmp_path)
    gate_trainer(strict, IncorrectRolloutGate(), broken, strict=True)
    with pytest.raises(RuntimeError, match="out of order"):
        strict.train()


def test_evaluation_is_not_gated(make: Any, tmp_path: Path) -> None:
    losses = []
    for gate in (None, partial(position, power=3.0)):
        trainer = make(tmp_path)
        if gate is not None:
            gate_trainer(trainer, gate)
        torch.manual_seed(0)
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[0] == losses[1]


def test_what_cannot_be_gated_is_refused(tmp_path: Path) -> None:
    for trainer in (sft_trainer(tmp_path), plain_trainer(tmp_path)):
        with pytest.raises(ValueError, match="must be TRL's DistillationTrainer or GKDTrainer"):
            gate_trainer(trainer, everything)
    trainer = distillation_trainer(tmp_path)
    with pytest.raises(ValueError, match="several teachers, but TRL's trainers have one"):
        gate_trainer(trainer, TeacherRouter(), odd)
    with pytest.raises(ValueError, match="give rewards"):
        gate_trainer(trainer, IncorrectRolloutGate())
    gate_trainer(trainer, everything)
    with pytest.raises(ValueError, match="already has a gate"):
        gate_trainer(trainer, everything)
