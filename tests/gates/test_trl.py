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
from tests.helpers.training import ROWS, odd_length_reward

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(params=[distillation_trainer, gkd_trainer], ids=["DistillationTrainer", "GKDTrainer"])
def make_trainer(request: pytest.FixtureRequest) -> Any:
    return request.param


def train(trainer: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train, and return the end state and the log."""
    trainer.train()
    return trainer_end_state(trainer), trainer.state.log_history


def pure_reward(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Rewards an odd number of words, without drawing random numbers."""
    return [float(len(completion.split()) % 2) for completion in completions]


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}])
def test_weights_of_one_change_no_bit(make_trainer: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    without_gate, logs = train(make_trainer(tmp_path, **changes))
    trainer = make_trainer(tmp_path, **changes)
    gate_trainer(trainer, everything, pure_reward)
    with_gate, gated_logs = train(trainer)
    for name, value in without_gate.items():
        assert torch.equal(value, with_gate[name]), name
    for entry, gated_entry in zip(logs[:-1], gated_logs[:-1], strict=True):
        assert entry["loss"] == gated_entry["loss"]
        for share in ("token_share", "rollout_share", "effective_share"):
            assert gated_entry[f"gate/{share}"] == 1
        if (
            make_trainer is distillation_trainer and not changes
        ):  # TRL's GKD divides by the tokens of the dataset's answers
            assert gated_entry["gate/loss_before"] == pytest.approx(gated_entry["loss"], rel=1e-5)
        assert gated_entry["gate/loss_after"] == gated_entry["gate/loss_before"]


def test_the_loss_is_the_weighted_mean_of_trl_s_own_terms(make_trainer: Any, tmp_path: Path) -> None:
    """Compared with the gradients of single tokens, for which a gate gives all other tokens the weight 0."""
    seen_tokens: list[Tokens] = []

    def keep_only(position: int | None, tokens: Tokens) -> Tensor:
        seen_tokens.append(tokens)
        weights = torch.ones_like(tokens.counts)
        return weights if position is None else weights * (torch.arange(len(tokens)) == position)

    def parameters(trainer: Any) -> Tensor:
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        return torch.cat([parameter.detach().flatten() for parameter in trained])

    def gradient(gate: Any) -> Tensor:
        trainer = make_trainer(tmp_path, max_steps=1, max_grad_norm=1e9, optim="sgd", learning_rate=1.0)
        before = parameters(trainer)
        gate_trainer(trainer, gate, pure_reward)
        trainer.train()
        return before - parameters(trainer)

    whole = gradient(partial(keep_only, None))
    count = len(seen_tokens[-1])
    weights = torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.1
    of_each_token = torch.stack([gradient(partial(keep_only, position)) for position in range(count)])
    torch.testing.assert_close(of_each_token.mean(dim=0), whole, rtol=1e-3, atol=1e-6)
    weighted = gradient(lambda tokens: weights if len(tokens) == count else tokens.counts)
    expected = (of_each_token * (weights / weights.sum())[:, None]).sum(dim=0)
    torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(weighted, whole, rtol=1e-2)


def test_only_incorrect_rollouts_are_distilled(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, per_device_train_batch_size=4)
    seen_tokens: list[Tokens] = []

    class RecordingGate(IncorrectRolloutGate):
        def __call__(self, tokens: Tokens) -> Tensor:
            seen_tokens.append(tokens)
            return super().__call__(tokens)

    gate_trainer(trainer, RecordingGate(), pure_reward)
    _, logs = train(trainer)
    for tokens, entry in zip(seen_tokens[-4:], logs, strict=False):
        correct = tokens.need("correct")
        assert torch.equal(correct, tokens.need("reward") == 1)
        assert entry["gate/token_share"] == pytest.approx(float((~correct).float().mean()))
    assert any(0 < entry["gate/token_share"] < 1 for entry in logs[:-1])


def test_rewards_get_the_rows_that_the_rollouts_answer(tmp_path: Path) -> None:
    rewarded: list[tuple[Any, ...]] = []

    def reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        rewarded.extend(zip(prompts, answer, strict=True))
        return pure_reward(prompts, completions)

    trainer = distillation_trainer(tmp_path)
    gate_trainer(trainer, IncorrectRolloutGate(), reward)
    trainer.train()
    assert set(rewarded) == {(row["prompt"], row["answer"]) for row in ROWS}

    references: list[tuple[Any, ...]] = []

    def reward_by_reference(prompts: list[str], completions: list[str], reference: list[str]) -> list[float]:
        references.extend(zip(prompts, reference, strict=True))
        return pure_reward(prompts, completions)

    gkd = gkd_trainer(tmp_path)
    gate_trainer(gkd, IncorrectRolloutGate(), reward_by_reference)
    gkd.train()
    assert {answer.split()[0] for _, answer in references} == set("abcd")
    for prompt, answer in set(references):
        assert any(row["prompt"] in prompt and row["answer"] in answer for row in ROWS)


def test_policies_are_those_of_the_models(make_trainer: Any, tmp_path: Path) -> None:
    """Compares the entropies that a gate sees with forward passes on the trainer's own batch."""
    seen_tokens: list[tuple[Tokens, dict[str, Tensor]]] = []
    trainer = make_trainer(tmp_path, max_steps=1, per_device_train_batch_size=4)
    batches: list[dict[str, Any]] = []
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        batches.append(inputs)
        return original(model, inputs, **options)

    trainer.compute_loss = compute_loss
    teacher = tiny_base(seed=5).float()

    def gate(tokens: Tokens) -> Tensor:
        if batches:
            seen_tokens.append((tokens, batches[-1]))
        return high_entropy(tokens)

    gate_trainer(trainer, gate)
    student = make_trainer(tmp_path).model
    trainer.train()
    tokens, batch = seen_tokens[-1]
    if "completion_ids" in batch:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        wanted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1)[:, 1:].bool()
    else:
        ids, mask, wanted = batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:] != -100
    with torch.no_grad():
        for model, name in ((student, "student_entropy"), (teacher, "teacher_entropy")):
            probabilities = torch.softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1][wanted], dim=-1)
            entropy = -(probabilities * probabilities.log()).sum(dim=-1)
            torch.testing.assert_close(getattr(tokens, name), entropy, rtol=1e-4, atol=1e-5)


def test_a_gate_learns_from_the_callback_s_probes(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    gate = AlignmentGate()
    gate_trainer(trainer, gate, pure_reward, teacher="base")
    add_callback(trainer)
    trainer.train()
    assert gate.evidence.teachers == ("answer", "base")
    assert any("odp/gate/base/incorrect" in entry for entry in trainer.state.log_history)
    misnamed = make_trainer(tmp_path)
    gate_trainer(misnamed, AlignmentGate(), pure_reward, teacher="other")
    with pytest.raises(ValueError, match="distils from 'other'; give the teachers the same names"):
        add_callback(misnamed)


def test_a_failing_reward_or_gate_causes_one_warning_and_its_batches_are_not_gated(
    make_trainer: Any, tmp_path: Path
) -> None:
    def failing_reward(*args: Any, **columns: Any) -> Any:
        raise RuntimeError("out of order")

    without_gate, _ = train(make_trainer(tmp_path))
    trainer = make_trainer(tmp_path)
    gate_trainer(trainer, IncorrectRolloutGate(), failing_reward)
    with pytest.warns(UserWarning, match="`reward` failed, and a batch was not gated: RuntimeError") as caught:
        end_state, logs = train(trainer)
    assert len([warning for warning in caught if "out of order" in str(warning.message)]) == 1
    assert all(torch.equal(value, end_state[name]) for name, value in without_gate.items())
    assert not any("gate/token_share" in entry for entry in logs)

    trainer, calls = make_trainer(tmp_path), []

    def gate_that_fails_later(tokens: Tokens) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of order")
        return tokens.counts

    gate_trainer(trainer, gate_that_fails_later)
    with pytest.warns(UserWarning, match="`gate` failed"):
        trainer.train()
    strict = make_trainer(tmp_path)
    gate_trainer(strict, IncorrectRolloutGate(), failing_reward, strict=True)
    with pytest.raises(RuntimeError, match="out of order"):
        strict.train()


def test_evaluation_is_not_gated(make_trainer: Any, tmp_path: Path) -> None:
    losses = []
    for gate in (None, partial(position, power=3.0)):
        trainer = make_trainer(tmp_path)
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
        gate_trainer(trainer, TeacherRouter(), odd_length_reward)
    with pytest.raises(ValueError, match="give rewards"):
        gate_trainer(trainer, IncorrectRolloutGate())
    gate_trainer(trainer, everything)
    with pytest.raises(ValueError, match="already has a gate"):
        gate_trainer(trainer, everything)


def reward_with_gaps(prompts: list[Any], completions: list[str], **columns: Any) -> list[float | None]:
    """Has nothing to say about completions that begin with one of the first words."""
    rewards = pure_reward(prompts, completions)
    return [None if text[:1] in "abc" else value for text, value in zip(completions, rewards, strict=True)]


def test_a_rollout_whose_reward_is_none_does_not_cost_the_batch_its_gate(make_trainer: Any, tmp_path: Path) -> None:
    """Warnings are errors here, so that none is issued, either."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=4)
    seen_tokens: list[Tokens] = []

    class RecordingGate(IncorrectRolloutGate):
        def __call__(self, tokens: Tokens) -> Tensor:
            seen_tokens.append(tokens)
            return super().__call__(tokens)

    gate_trainer(trainer, RecordingGate(), reward_with_gaps)
    _, logs = train(trainer)
    assert any(0 < entry["gate/unscored_share"] < 1 for entry in logs[:-1])
    assert not any(bool(tokens.need("reward").isnan().any()) for tokens in seen_tokens[1:])


def test_what_trl_passes_to_rewards_is_passed(tmp_path: Path) -> None:
    states: list[int] = []

    async def reward(completions: list[str], answer: list[str], trainer_state: Any, log_metric: Any) -> list[float]:
        states.append(trainer_state.global_step)
        log_metric("completions/words", sum(len(completion.split()) for completion in completions))
        return pure_reward([], completions)

    trainer = distillation_trainer(tmp_path)
    gate_trainer(trainer, IncorrectRolloutGate(), reward)
    _, logs = train(trainer)
    assert states == [0, 1, 2, 3]
    assert all("completions/words" in entry for entry in logs[:-1])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda prompts, completions, solution: [],
            r"needs the argument 'solution', but .* \['answer'\]; .* `def reward",
        ),
        (lambda texts, /: [], "by position only"),
        (torch.nn.Linear(1, 1), "the model Linear"),
        (int, "the class int was given"),
    ],
    ids=["column", "position", "module", "class"],
)
def test_rewards_that_cannot_be_called_are_refused_before_training(reward: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        gate_trainer(distillation_trainer(tmp_path), IncorrectRolloutGate(), reward)


def test_columns_that_gkd_does_not_keep_are_refused_before_training(tmp_path: Path) -> None:
    def reward(completions: list[str], answer: list[str]) -> list[float]:
        return pure_reward([], completions)

    with pytest.raises(TypeError, match=r"needs the argument 'answer', but .* \['reference'\]"):
        gate_trainer(gkd_trainer(tmp_path), IncorrectRolloutGate(), reward)


def test_questions_that_cannot_be_decoded_cost_the_gating_and_not_the_training(tmp_path: Path) -> None:
    trainer = gkd_trainer(tmp_path)
    gate_trainer(trainer, IncorrectRolloutGate(), lambda prompts, completions, **columns: [0.0] * len(completions))

    def failing_decode(sequences: Any, **options: Any) -> list[str]:
        raise OverflowError("no text")

    trainer.processing_class.batch_decode = failing_decode
    with pytest.warns(UserWarning, match="OverflowError: no text") as caught:
        trainer.train()
    assert "the questions of a batch could not be read" in str(caught[0].message)
    assert trainer.state.global_step == 4
