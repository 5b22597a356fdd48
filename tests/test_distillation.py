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
from odp_callbacks.gates import IncorrectRolloutGate, Tokens, gate_weights
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.training import make_loader, make_trainer

ROWS = [
    {"prompt": prompt, "answer": answer} for prompt, answer in zip(("a b", "c a f", "b", "d c"), "abcd", strict=True)
]


def make_module(teachers: Any = None, **changes: Any) -> OnPolicyDistillation:
    options = {"max_new_tokens": 6, "learning_rate": 3e-2}
    return OnPolicyDistillation(
        tiny("llama").float().train(), word_tokenizer(), teachers or "base", **(options | changes)
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
    module = make_module("{answer} {prompt}", divergence=divergence, temperature=0.7, **options).eval()
    torch.manual_seed(3)
    rollouts = module.sample(ROWS)
    batch_losses = module.token_losses(rollouts)
    losses, mask = batch_losses.losses, batch_losses.mask
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 1
    for index, rollout in enumerate(rollouts):
        length = len(rollout.response_ids)
        assert mask[index].tolist() == [1.0] * length + [0.0] * (mask.shape[1] - length)
        assert losses[index, length:].abs().sum() == 0
        student_logits = module.student(input_ids=rollout.sequence[None]).logits[0, -length - 1 : -1]
        teacher_prompt = f"{rollout.question.row['answer']} {rollout.question.row['prompt']}"
        teacher_ids = torch.tensor([[*module.tokenizer(teacher_prompt)["input_ids"], *rollout.response_ids]])
        teacher_logits = module.student(input_ids=teacher_ids).logits[0, -length - 1 : -1]
        tokens = torch.tensor(rollout.response_ids) if divergence == "sampled_token" else None
        expected = distillation_loss(
            student_logits, teacher_logits, divergence, tokens=tokens, temperature=0.7, **options
        )
        torch.testing.assert_close(losses[index, :length], expected, rtol=1e-4, atol=1e-5)


def test_the_student_learns_to_follow_its_teacher() -> None:
    torch.manual_seed(0)
    module = make_module(ModelTeacher(tiny("llama", seed=1).float()))

    def distance() -> float:
        torch.manual_seed(7)
        with torch.no_grad():
            batch_losses = module.token_losses(module.sample(ROWS * 8))
        return float(batch_losses.losses.sum() / batch_losses.mask.sum())

    distance_before = distance()
    trainer = Trainer(
        max_steps=40, max_epochs=100, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ROWS, batch_size=4, collate_fn=list))
    assert distance() < 0.7 * distance_before


def training_loss(module: OnPolicyDistillation) -> tuple[Tensor, dict[str, float]]:
    """The loss of one training step on sampled rollouts, and what it logs."""
    torch.manual_seed(2)
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    module.log_dict = lambda metrics, **_: logged.update(metrics)  # type: ignore[method-assign]
    return module.training_step(ROWS, 0), logged


def contains_answer_reward(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
    return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]


def test_a_gate_weighs_tokens_and_the_loss_keeps_its_scale() -> None:
    plain, _ = training_loss(make_module().eval())
    doubled, logged = training_loss(make_module(gate=lambda tokens: 2 * torch.ones(len(tokens))).eval())
    torch.testing.assert_close(doubled, plain)
    assert logged["train/gate/token_share"] == 1
    assert logged["train/gate/loss_before"] == pytest.approx(logged["train/gate/loss_after"])
    of_first_tokens, _ = training_loss(make_module(gate=lambda tokens: (tokens.depth == 0).float()).eval())
    torch.manual_seed(2)
    module = make_module().eval()
    batch_losses = module.token_losses(module.sample(ROWS))
    torch.testing.assert_close(of_first_tokens, batch_losses.losses[:, 0].mean())
    of_no_token, logged = training_loss(make_module(gate=lambda tokens: torch.zeros(len(tokens))).eval())
    assert of_no_token == 0
    of_no_token.backward()
    assert logged["train/gate/token_share"] == 0


def test_the_gate_sees_the_features_of_both_policies() -> None:
    seen_tokens: list[Tokens] = []

    def gate(tokens: Tokens) -> Tensor:
        seen_tokens.append(tokens)
        return torch.ones(len(tokens))

    module = make_module(
        "{answer} {prompt}", gate=gate, reward=contains_answer_reward, temperature=0.7, rollouts_per_question=2
    ).eval()
    training_loss(module)
    torch.manual_seed(2)
    rollouts = module.sample(ROWS)
    tokens, start = seen_tokens[-1], 0
    for index, rollout in enumerate(rollouts):
        token_ids = torch.tensor(rollout.response_ids)
        length = len(token_ids)
        of_rollout = slice(start, start := start + length)
        logits = module.student(input_ids=rollout.sequence[None]).logits[0, -length - 1 : -1] / 0.7
        policy = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(tokens.student_entropy[of_rollout], policy.entropy(), rtol=1e-4, atol=1e-5)
        log_prob = policy.log_prob(token_ids)
        torch.testing.assert_close(tokens.student_log_prob[of_rollout], log_prob, rtol=1e-4, atol=1e-5)
        assert tokens.rollout[of_rollout].tolist() == [index] * length
        assert tokens.correct[of_rollout].tolist() == [rollout.reward >= 1] * length
        rewards = [sibling.reward for sibling in rollouts if sibling.question is rollout.question]
        assert tokens.pass_rate[of_rollout].tolist() == pytest.approx([sum(rewards) / 2] * length)
    # The loss is the reverse KL, to which the teacher's probabilities contribute, too.
    batch_losses = module.token_losses(rollouts)
    losses = batch_losses.losses[batch_losses.mask.bool()].detach()
    torch.testing.assert_close(tokens.reverse_kl, losses, rtol=1e-4, atol=1e-5)


class DepthParityRouter:
    """Routes even depths to the first teacher and odd ones to the second."""

    def __call__(self, tokens: Tokens) -> Tensor:
        return torch.ones(len(tokens))

    def route(self, tokens: Tokens) -> Tensor:
        return tokens.depth % 2


def test_each_token_has_the_teacher_that_the_gate_chose() -> None:
    teachers = {"base": BaseTeacher(), "answer": Teacher("{answer} {prompt}")}

    def losses(teachers: Any, gate: Any = None) -> TokenLosses:
        module = make_module(teachers, gate=gate).eval()
        torch.manual_seed(3)
        return module.token_losses(module.sample(ROWS))

    routed, base, answer = losses(teachers, DepthParityRouter()), losses(BaseTeacher()), losses(teachers["answer"])
    torch.testing.assert_close(routed.losses[:, ::2], base.losses[:, ::2])
    torch.testing.assert_close(routed.losses[:, 1::2], answer.losses[:, 1::2])
    assert not torch.allclose(base.losses, answer.losses)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("`gate` needs 'correct' of every token", {"gate": IncorrectRolloutGate()}),
        ("`gate` does not choose among them", {"teachers": {"a": BaseTeacher(), "b": Teacher("{answer} {prompt}")}}),
        ("one weight for each of the 5 tokens", {"gate": lambda tokens: torch.ones(3)}),
        ("finite and not negative", {"gate": lambda tokens: -torch.ones(len(tokens))}),
        ("`gate` must be a function", {"gate": 3}),
    ],
)
def test_an_unusable_gate_is_refused_at_once(match: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        make_module(**options)


@pytest.mark.parametrize("teacher", [Teacher("{answer} {prompt}"), BaseTeacher(), EMATeacher(0.9), AdapterTeacher("t")])
def test_the_teacher_gets_no_gradient_and_the_student_keeps_its_adapter(teacher: Any) -> None:
    student = tiny("llama").float().train()
    student.add_adapter("t", student.peft_config["default"])
    module = OnPolicyDistillation(student, word_tokenizer(), teacher, max_new_tokens=4)
    module.log = lambda *args, **keywords: None  # type: ignore[method-assign]
    module.on_train_start = lambda: None  # type: ignore[method-assign]
    flags = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    module.training_step(ROWS, 0).backward()
    assert {name: parameter.requires_grad for name, parameter in student.named_parameters()} == flags
    with_gradient = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all(".default." in name for name in with_gradient)
    assert student.active_adapter == "default"


def test_rollouts_are_sampled_without_dropout_and_training_mode_is_restored() -> None:
    module = make_module().train()
    training_flags = []
    module.student.get_base_model().register_forward_pre_hook(lambda model, _: training_flags.append(model.training))
    module.sample(ROWS)
    assert training_flags
    assert not any(training_flags)
    assert all(submodule.training for submodule in module.student.modules())


def test_a_response_without_a_reward_is_trained_without_the_gate() -> None:
    def reward(prompts: Any, completions: Any, answer: Any) -> list[float | None]:
        return [None if one == "a" else 0.0 if one == "b" else 1.0 for one in answer]

    module = make_module(reward=reward, gate=IncorrectRolloutGate())
    rollouts = module.sample(ROWS)
    losses = module.token_losses(rollouts)
    weights, logs = gate_weights(module.gate, losses.mask, losses.tokens)
    assert logs["gate/unscored_share"] == 0.25
    assert [float(row.max()) > 0 for row in weights] == [True, True, False, False]
    assert weights[0].sum() == losses.mask[0].sum()
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, make_loader(ROWS, batch_size=4))
    assert trainer.callback_metrics["train/reward"] == pytest.approx(2 / 3)


# --- what a callback sees of the rollouts


@pytest.mark.filterwarnings("ignore:You are trying to `self.log..`:UserWarning")
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_training_step_shows_its_rollouts(temperature: float) -> None:
    def reward(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completion) % 2) for completion in completions]

    module = make_module(temperature=temperature, reward=reward, rollouts_per_question=2)
    module.training_step(ROWS, 0)
    assert len(module.last_rollouts) == 2 * len(ROWS)
    for rollout in module.last_rollouts:
        assert any(rollout.row is row for row in ROWS)
        assert rollout.temperature == temperature
        assert rollout.reward in (0.0, 1.0)
        prompt = module.tokenizer(rollout.row["prompt"])["input_ids"]
        logits = module.student(input_ids=torch.tensor([[*prompt, *rollout.response_ids]])).logits[0]
        log_probs = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
        expected = log_probs[range(len(rollout.response_ids)), list(rollout.response_ids)].detach()
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log..`:UserWarning")
def test_with_dropout_the_forward_of_the_training_is_not_the_policy() -> None:
    student = tiny("llama", dropout=0.1).float()
    module = OnPolicyDistillation(student, word_tokenizer(), "base", max_new_tokens=4)
    for training in (True, False):
        student.train(training)
        module.training_step(ROWS, 0)
        assert all((rollout.log_probs is None) == training for rollout in module.last_rollouts)
        assert all(rollout.reward is None for rollout in module.last_rollouts), "nothing scores them"
