"""A gate in TRL's distillation trainers, without a subclass of the user's."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odp_callbacks.engine.prompts import Question, Row
from odp_callbacks.engine.rewards import RewardFunction, score
from odp_callbacks.gates import Gate, gate_weights, tokens_of
from odp_callbacks.gates.loss import check_gate
from odp_callbacks.gates.tokens import Router, policy_features

CHUNK = 256
"""Tokens whose logits are held at a time, where a gate asks for policies that TRL itself never holds whole."""


def gate_trainer(
    trainer: Any,
    gate: Gate,
    reward: RewardFunction | None = None,
    *,
    success_threshold: float = 1.0,
    teacher: str = "teacher",
    strict: bool = False,
) -> None:
    """Let a gate weigh each token in this trainer's loss; TRL's `DistillationTrainer` or `GKDTrainer`.

    The loss stays TRL's own, token by token; its terms are multiplied by the gate's weights, renormalised to a mean of
    1 in each micro-batch, before they are summed. With a gate that lets everything through, the training is bit for bit
    the one without. In evaluation nothing is gated. ``gate/token_share``, ``gate/rollout_share``,
    ``gate/effective_share``, ``gate/loss_before`` and ``gate/loss_after`` are logged with the trainer's own metrics.
    The gate becomes ``trainer.gate``, where a :class:`~odp_callbacks.GradientAlignmentTrainerCallback` finds it and
    lets it learn.

    Args:
        trainer: The trainer, before ``train()``.
        gate: From tokens to weights; see :mod:`odp_callbacks.gates`.
        reward: TRL reward function, for a gate that asks for rewards or correctness. `DistillationTrainer` gives it the
            dataset's columns. `GKDTrainer` keeps none of them: it gets the decoded prompts, and as ``reference`` the
            decoded answer of the dataset.
        success_threshold: Reward from which a rollout counts as correct.
        teacher: The teacher's name, for a gate that learns from probes: the same as there.
        strict: Let a failing reward or gate fail the run. Otherwise it is said once, and such a batch is not gated.

    Raises:
        ValueError: If the trainer has no loss that can be gated, or the gate needs what the trainer does not know.
        ImportError: If TRL is missing or too old.

    Examples:
        ::

            trainer = DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=rows)
            gate_trainer(trainer, IncorrectRolloutGate(), reward=exact_match)
            trainer.train()
    """
    try:
        from trl import DistillationTrainer
        from trl.experimental.gkd import GKDTrainer
    except ImportError as error:
        raise ImportError(
            "`gate_trainer` needs TRL with its `DistillationTrainer`: pip install 'trl>=1.16'."
        ) from error
    if isinstance(gate, Router):
        raise ValueError(
            "`gate` chooses among several teachers, but TRL's trainers have one; use an AlignmentGate, or "
            "OnPolicyDistillation(teacher={...}, gate=...)."
        )
    if hasattr(trainer, "gate"):
        raise ValueError("`trainer` already has a gate; give it one.")
    check_gate(gate, rewards=reward is not None, teachers=(teacher,))
    weigher = _Weigher(trainer, gate, reward, success_threshold, teacher, strict)
    if isinstance(trainer, DistillationTrainer):
        _Distillation(weigher).install()
    elif isinstance(trainer, GKDTrainer):
        _GKD(weigher).install()
    else:
        raise ValueError(
            f"`trainer` must be TRL's DistillationTrainer or GKDTrainer, whose loss is a distillation's, but "
            f"{type(trainer).__name__} was given."
        )
    trainer.gate, trainer.gate_teachers = gate, (teacher,)


class _Weigher:
    """What is the same for all trainers: rewards, weights, logs, and what happens when one of them fails."""

    def __init__(
        self, trainer: Any, gate: Gate, reward: RewardFunction | None, threshold: float, teacher: str, strict: bool
    ) -> None:
        self.trainer, self.gate, self.reward = trainer, gate, reward
        self.threshold, self.teacher, self.strict = threshold, teacher, strict
        self.said: set[str] = set()
        try:
            check_gate(gate, rewards=reward is not None, policies=False, teachers=(teacher,))
            self.policies = False
        except ValueError:
            self.policies = True

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        tokenizer: Any = self.trainer.processing_class
        texts: list[str] = tokenizer.batch_decode([list(ids) for ids in rows], skip_special_tokens=True)
        return texts

    def score(self, rows: Sequence[Row], completions: Sequence[Sequence[int]]) -> list[float] | None:
        """Rewards of completions, or None where they are not asked for or cannot be had."""
        if self.reward is None:
            return None
        nothing = torch.empty(0, dtype=torch.long)
        questions = [Question(str(i), row, nothing) for i, row in enumerate(rows)]
        try:
            return score(self.reward, questions, self.decode(completions), completions)
        except Exception as error:
            self.fail("`reward` failed", error)
            return None

    def weights(
        self,
        mask: Tensor,
        rewards: Sequence[float] | None,
        questions: Sequence[str],
        features: Callable[[], dict[str, Tensor]],
        losses: Tensor,
    ) -> Tensor:
        """Weights ``(N,)`` of the tokens of ``mask`` ``(B, T)``, whose losses ``(N,)`` are logged; or ones."""
        ones = torch.ones_like(losses)
        if self.reward is not None and rewards is None:  # that it failed was said
            return ones
        try:
            tokens = tokens_of(mask, rewards, questions, success_threshold=self.threshold, teachers=(self.teacher,))
            if self.policies:
                known: dict[str, Any] = {**features()}
                tokens = replace(tokens, **known)
            weights, logs = gate_weights(self.gate, mask, tokens)
        except Exception as error:
            self.fail("`gate` failed", error)
            return ones
        found = weights[mask.bool()].to(losses)
        if len(losses):
            logs |= {"gate/loss_before": float(losses.mean()), "gate/loss_after": float((losses * found).mean())}
            for name, value in logs.items():
                self.trainer._metrics["train"][name].append(value)
        return found

    def fail(self, what: str, error: Exception) -> None:
        if self.strict:
            raise error
        message = f"odp-callbacks: {what}, and a batch was not gated: {type(error).__name__}: {error}"
        if message not in self.said and self.trainer.is_world_process_zero():
            self.said.add(message)
            warnings.warn(message, stacklevel=2)


class _Distillation:
    """`DistillationTrainer`: rewards when it samples, weights where its loss is still one number a token."""

    def __init__(self, weigher: _Weigher) -> None:
        self.weigher, trainer = weigher, weigher.trainer
        self.sample, self.loss = trainer._generate_and_score_completions, trainer._compute_loss
        self.module = sys.modules["trl.trainer.distillation_trainer"]

    def install(self) -> None:
        trainer = self.weigher.trainer
        trainer._generate_and_score_completions = self.sample_and_score
        trainer._compute_loss = self.gated_loss

    def sample_and_score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with two more lists, which it shuffles and splits as it does the tensors."""
        output: dict[str, Any] = self.sample(rows)
        if self.weigher.trainer.model.training:
            mask = output["completion_mask"].bool()
            completions = [ids[there].tolist() for ids, there in zip(output["completion_ids"], mask, strict=True)]
            rewards = self.weigher.score(rows, completions)
            output["odp_questions"] = [repr(row["prompt"]) for row in rows]
            if rewards is not None:
                output["odp_rewards"] = rewards
        return output

    def gated_loss(self, student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        if not self.weigher.trainer.model.training:
            return self.loss(student, inputs, num_items_in_batch)
        with self.terms(inputs):
            return self.loss(student, inputs, num_items_in_batch)

    @contextmanager
    def terms(self, inputs: dict[str, Any]) -> Iterator[None]:
        """While this lasts, TRL's function of one divergence per token gives weighted ones."""
        module: Any = self.module
        original = module.ChunkedDivergenceFunction
        module.ChunkedDivergenceFunction = _Weighted(original, self.weigher, inputs)
        try:
            yield
        finally:
            module.ChunkedDivergenceFunction = original


class _Weighted:
    """In place of TRL's autograd function, whose ``apply`` gives divergence and entropy of each token."""

    def __init__(self, original: Any, weigher: _Weigher, inputs: dict[str, Any]) -> None:
        self.original, self.weigher, self.inputs = original, weigher, inputs

    def apply(self, *args: Any) -> tuple[Tensor, Tensor]:
        divergence, entropy = self.original.apply(*args)
        inputs = self.inputs
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        mask = mask.to(divergence.device)
        # TRL hands over all places of the batch, or only those with a token.
        there = mask.flatten() if len(divergence) == mask.numel() else mask.new_ones(len(divergence))
        taken = inputs["completion_ids"].to(divergence.device)[mask]
        weights = self.weigher.weights(
            mask,
            inputs.get("odp_rewards"),
            inputs["odp_questions"],
            partial(_features, args, there, taken),
            divergence.detach()[there],
        )
        return divergence * torch.ones_like(divergence).masked_scatter(there, weights), entropy


@torch.no_grad()
def _features(args: Sequence[Any], there: Tensor, taken: Tensor) -> dict[str, Tensor]:
    """What two policies say at each token, from hidden states and heads as TRL hands them over."""
    student, student_head, student_bias, teacher, teacher_head, teacher_bias = args[:6]
    temperature, student_scale, student_cap, teacher_scale, teacher_cap = args[7:12]
    parts: list[dict[str, Tensor]] = []
    for rows in there.nonzero()[:, 0].split(CHUNK):
        first = sum(len(part["reverse_kl"]) for part in parts)
        parts.append(
            policy_features(
                _logits(student[rows], student_head, student_bias, student_scale, student_cap),
                _logits(teacher[rows], teacher_head, teacher_bias, teacher_scale, teacher_cap),
                taken[first : first + len(rows)],
                temperature,
            )
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden.to(head.dtype), head, bias).float() * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _GKD:
    """`GKDTrainer`: its loss is of one row a token, and all it knows of a question is the tokens."""

    def __init__(self, weigher: _Weigher) -> None:
        self.weigher, trainer = weigher, weigher.trainer
        self.step, self.loss = trainer.training_step, trainer.generalized_jsd_loss
        self.rows: list[Row] = []

    def install(self) -> None:
        self.weigher.trainer.training_step = self.remember
        self.weigher.trainer.generalized_jsd_loss = self.gated_loss

    def remember(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Questions and reference answers, before the student's own responses take their place."""
        prompts, there = inputs["prompts"], inputs["prompt_attention_mask"].bool()
        labels = inputs["labels"]
        self.rows = [
            {"prompt": prompt, "reference": reference}
            for prompt, reference in zip(
                self.weigher.decode([ids[m].tolist() for ids, m in zip(prompts, there, strict=True)]),
                self.weigher.decode([ids[ids != -100].tolist() for ids in labels]),
                strict=True,
            )
        ]
        loss: Tensor = self.step(model, inputs, *args, **kwargs)
        return loss

    def gated_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The same arguments as TRL's."""
        options = {"labels": labels, "beta": beta, "temperature": temperature}
        if not self.weigher.trainer.model.training:
            whole: Tensor = self.loss(
                student_logits, teacher_logits, reduction=reduction, num_items_in_batch=num_items_in_batch, **options
            )
            return whole
        terms: Tensor = self.loss(student_logits, teacher_logits, reduction="none", **options)  # (N, V)
        mask = labels != -100
        rewards = self.weigher.score(self.rows, [ids[m].tolist() for ids, m in zip(labels, mask, strict=True)])
        weights = self.weigher.weights(
            mask,
            rewards,
            [row["prompt"] for row in self.rows],
            lambda: policy_features(student_logits[mask], teacher_logits[mask], labels[mask], temperature),
            terms.detach().sum(dim=-1),
        )
        total = (terms * weights[:, None]).sum()
        if num_items_in_batch is None:
            return total / mask.sum().clamp(min=1)
        return total / torch.as_tensor(num_items_in_batch, device=total.device)
