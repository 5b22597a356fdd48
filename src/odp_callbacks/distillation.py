"""A ready-made LightningModule for on-policy distillation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.gradients.logits import node_logits
from odp_callbacks.engine.gradients.loss_directions import UserLoss
from odp_callbacks.engine.prompts import as_questions, rows_from_batch, text_tokenizer
from odp_callbacks.engine.rewards import RewardFunction, check_reward
from odp_callbacks.engine.rollouts import Rollout, end_tokens, sample_rollouts, score_rollouts
from odp_callbacks.engine.sharded_parameters import is_sharded
from odp_callbacks.engine.teachers import ServedTeacher, as_teachers, teacher_logits, teacher_prompt_ids
from odp_callbacks.engine.teachers.saved_states import load_or_keep, restore_teachers
from odp_callbacks.engine.training_rollouts import TrainingRollout
from odp_callbacks.engine.user_defaults import UserDefaults
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.functional.distillation_losses import Divergence, check_divergence, distillation_loss
from odp_callbacks.functional.gradients import drops_out, evaluation_mode
from odp_callbacks.functional.policies import token_log_probs
from odp_callbacks.functional.tokens import Tokens, policy_features, tokens_of
from odp_callbacks.gates.loss import check_gate, gate_loss, route
from odp_callbacks.gates.protocols import Gate, Router, Stateful
from odp_callbacks.gates.rules import everything

SAMPLING_BATCH_SIZE = 256
"""Largest number of responses that are sampled at a time."""


@dataclass(frozen=True)
class TokenLosses:
    """The distillation losses of a batch of rollouts.

    Attributes:
        losses: ``(B, T)``, in nats; 0 on padding.
        mask: ``(B, T)``, 1 where there is a token.
        tokens: The tokens as a gate sees them, in the order of ``losses[mask]``.
        log_probs: ``(N,)`` float32 or wider, of the response tokens one rollout after the other, at the temperature of
            the sampling; None if dropout is active, so that the forward pass is not that of the student which sampled.
    """

    losses: Tensor
    mask: Tensor
    tokens: Tokens
    log_probs: Tensor | None = None


class OnPolicyDistillation(LightningModule):
    """Train a student on its own rollouts to follow a teacher, token by token.

    Each training step samples responses from the student (without dropout), computes the teacher's distribution at
    each of their tokens, and returns the mean distillation loss. Batches are lists of rows in TRL's convention
    (``DataLoader(rows, collate_fn=list)``), or mappings of columns.

    Args:
        student: Causal language model with LoRA (peft).
        tokenizer: The student's tokenizer.
        teachers: A :class:`~odp_callbacks.engine.teachers.Teacher`, a model, ``"base"`` or a context template; or
            a mapping from names to several of them, among which the ``gate`` chooses. For a gate that learns from
            probes, a teacher must have the name that it has in the callback: ``{"answer": Teacher(...)}``.
        divergence: ``"reverse_kl"``, ``"forward_kl"``, ``"jsd"``, ``"sampled_token"``, or a function
            ``f(student_logits, teacher_logits)`` from ``(N, V)`` to ``(N,)``.
        beta: Interpolation parameter of ``"jsd"``.
        top_k: Number of tokens that the loss is restricted to; None for the whole vocabulary.
        temperature: Temperature of sampling, and of both models in the loss.
        max_new_tokens: Largest number of tokens in a response.
        rollouts_per_question: Number of responses to each row of a batch.
        eos_token_ids: Further tokens that end a response.
        reward: TRL reward function, for the gate; its mean is logged. None if rewards are not needed.
        gate: Maps tokens to weights in the loss, and may choose the teacher of each; see :mod:`odp_callbacks.gates`.
            The loss is the weighted mean over tokens. None: every token has the same weight.
        success_threshold: Reward from which a rollout counts as correct.
        learning_rate: Learning rate of AdamW; override ``configure_optimizers`` for another optimizer.
        chat_template: Template in place of the tokenizer's own. A callback renders its probes' prompts likewise.
        chat_template_kwargs: Options of the chat template, such as ``{"enable_thinking": False}``.
        tools: Functions, or JSON schemas of functions, that the chat template shows the model.

    Raises:
        ValueError: If an option is out of range, there is no end-of-sequence token, there are several teachers but no
            gate that chooses among them, or the gate needs something that the training does not know.

    Examples:
        >>> from odp_callbacks import OnPolicyDistillation
        >>> OnPolicyDistillation.__mro__[1].__name__
        'LightningModule'
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        teachers: object,
        *,
        divergence: Divergence | UserLoss = "reverse_kl",
        beta: float | None = None,
        top_k: int | None = None,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        rollouts_per_question: int = 1,
        eos_token_ids: tuple[int, ...] = (),
        reward: RewardFunction | None = None,
        gate: Gate | None = None,
        success_threshold: float = 1.0,
        learning_rate: float = 1e-4,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        if not callable(divergence):
            check_divergence(divergence, beta, top_k)
        if max_new_tokens < 1 or rollouts_per_question < 1 or not temperature > 0:
            raise ValueError(
                "`max_new_tokens`, `rollouts_per_question` and `temperature` must be positive, but "
                f"{max_new_tokens!r}, {rollouts_per_question!r} and {temperature!r} were given."
            )
        self.student = student
        self.tokenizer = tokenizer = text_tokenizer(tokenizer)
        self.teachers = as_teachers(teachers)
        for teacher in self.teachers.values():
            teacher.check(student, tokenizer)
            if isinstance(teacher, ServedTeacher):
                raise ValueError(
                    "`teachers` has a teacher behind a server, which probes can ask, but OnPolicyDistillation trains "
                    "on the policies of models; give `ModelTeacher(model)`, or use TRL's ServerDistillationTrainer."
                )
        if reward is not None:
            check_reward(reward)
        if gate is not None:
            check_gate(gate, rewards=reward is not None, teachers=tuple(self.teachers))
        if len(self.teachers) > 1 and not isinstance(gate, Router):
            raise ValueError(
                f"`teachers` gives {len(self.teachers)} teachers {list(self.teachers)}, but `gate` does not choose "
                "among them; give `gate=TeacherRouter()`, or one teacher."
            )
        self.divergence, self.beta, self.top_k, self.temperature = divergence, beta, top_k, temperature
        self.max_new_tokens, self.rollouts_per_question = max_new_tokens, rollouts_per_question
        self.eos_token_ids = end_tokens(student, tokenizer, eos_token_ids)
        self.reward, self.gate, self.success_threshold = reward, gate, success_threshold
        self.learning_rate = learning_rate
        self.chat_template, self.chat_template_kwargs, self.tools = chat_template, chat_template_kwargs, tools
        self._user_defaults: UserDefaults | None = None
        # The callback measures the update on them.
        self.last_rollouts: list[TrainingRollout] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sample rollouts, compare them with the teacher, and return the loss."""
        rollouts = self.sample(batch)
        batch_losses = self.token_losses(rollouts)
        self.last_rollouts = self._training_rollouts(rollouts, batch_losses.log_probs)
        gate = everything if self.gate is None else self.gate
        gated = gate_loss(gate, batch_losses.losses, batch_losses.mask, batch_losses.tokens)
        count = len(rollouts)
        self.log("train/loss", gated.loss.detach(), batch_size=count, prog_bar=True)
        self.log("train/response_tokens", batch_losses.mask.sum() / count, batch_size=count)
        if self.gate is not None:
            self.log_dict({f"train/{name}": value for name, value in gated.logs.items()}, batch_size=count)
        if self.reward is not None:
            rewards = [rollout.reward for rollout in rollouts if not math.isnan(rollout.reward)]
            mean_reward = sum(rewards) / len(rewards) if rewards else math.nan
            self.log("train/reward", mean_reward, batch_size=count, prog_bar=True)
        return gated.loss

    def sample(self, batch: Any) -> list[Rollout]:
        """Sample student rollouts on a batch, and score them if there is a reward function."""
        with torch.no_grad(), evaluation_mode(self.student):
            rollouts = sample_rollouts(
                self.student,
                self.tokenizer,
                as_questions(rows_from_batch(batch), self.tokenizer, template=self._template),
                per_question=self.rollouts_per_question,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                eos_token_ids=self.eos_token_ids,
                randomness=None,
                batch_size=SAMPLING_BATCH_SIZE,
            )
        if self.reward is None:
            return rollouts
        with (self._user_defaults or UserDefaults()).applied():
            return score_rollouts(Verifier(self.reward), rollouts)

    @property
    def _template(self) -> ChatTemplate:
        """How messages are rendered."""
        return ChatTemplate(self.chat_template, dict(self.chat_template_kwargs or {}), list(self.tools or ()))

    def token_losses(self, rollouts: Sequence[Rollout]) -> TokenLosses:
        """Compute the distillation loss of every response token, each with its own teacher."""
        responses = [rollout.response_ids for rollout in rollouts]
        depths = [range(len(response)) for response in responses]
        tokens = route(self.gate, self._tokens(rollouts))
        all_teacher_logits = self._teacher_logits(rollouts, tokens)
        all_student_logits = node_logits(
            self.student,
            [rollout.sequence for rollout in rollouts],
            [rollout.positions(response_depths) for rollout, response_depths in zip(rollouts, depths, strict=True)],
        )
        losses, features, log_probs = [], [], []
        has_dropout = drops_out(self.student)
        for student_logits, target_logits, response in zip(
            all_student_logits, all_teacher_logits, responses, strict=True
        ):
            token_ids = torch.tensor(response, device=student_logits.device)
            if not has_dropout:
                log_probs.append(token_log_probs(student_logits.detach(), token_ids, self.temperature))
            student_logits = student_logits[:, : target_logits.shape[-1]]
            losses.append(self._loss(student_logits, target_logits, token_ids))
            if self.gate is not None:
                features.append(
                    policy_features(student_logits, target_logits.to(student_logits), token_ids, self.temperature)
                )
        joined: dict[str, Any] = {
            name: torch.cat([rollout_features[name] for rollout_features in features])
            for name in (features[0] if features else ())
        }
        return TokenLosses(
            pad_sequence(losses, batch_first=True),
            self._response_mask(rollouts),
            replace(tokens, **joined),
            torch.cat(log_probs) if log_probs else None,
        )

    def _training_rollouts(self, rollouts: Sequence[Rollout], log_probs: Tensor | None) -> list[TrainingRollout]:
        """The rollouts as a callback sees them."""
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        of_rollouts = [None] * len(rollouts) if log_probs is None else log_probs.cpu().split(lengths)
        return [
            TrainingRollout(
                rollout.question.row,
                rollout.response_ids,
                None if self.reward is None else rollout.reward,
                None if of_tokens is None else of_tokens.tolist(),
                self.temperature,
            )
            for rollout, of_tokens in zip(rollouts, of_rollouts, strict=True)
        ]

    def _response_mask(self, rollouts: Sequence[Rollout]) -> Tensor:
        """``(B, T)``, 1 where there is a response token."""
        device = next(self.student.parameters()).device
        lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts], device=device)
        return (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).float()

    def _tokens(self, rollouts: Sequence[Rollout]) -> Tokens:
        """The response tokens before a gate has chosen teachers."""
        return tokens_of(
            self._response_mask(rollouts),
            None if self.reward is None else [rollout.reward for rollout in rollouts],
            [id(rollout.question) for rollout in rollouts],
            success_threshold=self.success_threshold,
            teachers=tuple(self.teachers),
        )

    def _teacher_logits(self, rollouts: Sequence[Rollout], tokens: Tokens) -> list[Tensor]:
        """The logits of each token's teacher, ``(T, V')`` for each rollout.

        A teacher reads only the rollouts that have tokens of its own.
        """
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        teacher_of_token = [indices.tolist() for indices in tokens.need("teacher").split(lengths)]
        parts: list[list[tuple[list[int], Tensor]]] = [[] for _ in rollouts]
        with evaluation_mode(self.student):
            for teacher_index, teacher in enumerate(self.teachers.values()):
                depths_of_teacher = [
                    [depth for depth, chosen_teacher in enumerate(indices) if chosen_teacher == teacher_index]
                    for indices in teacher_of_token
                ]
                rollout_indices = [rollout_index for rollout_index, depths in enumerate(depths_of_teacher) if depths]
                if not rollout_indices:
                    continue
                logits = teacher_logits(
                    teacher,
                    self.student,
                    [
                        teacher_prompt_ids(teacher, self.tokenizer, rollouts[rollout_index].question)
                        for rollout_index in rollout_indices
                    ],
                    [rollouts[rollout_index].response_ids for rollout_index in rollout_indices],
                    [depths_of_teacher[rollout_index] for rollout_index in rollout_indices],
                )
                for rollout_index, rollout_logits in zip(rollout_indices, logits, strict=True):
                    parts[rollout_index].append((depths_of_teacher[rollout_index], rollout_logits))
        vocabulary = min(logits.shape[-1] for rollout_parts in parts for _, logits in rollout_parts)
        return [_in_order_of_depth(rollout_parts, vocabulary) for rollout_parts in parts]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW on all parameters that require gradients."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)

    def on_fit_start(self) -> None:
        """Remember torch's defaults for the reward function: Lightning sets others in a training step.

        Raises:
            ValueError: If the student is sharded.
        """
        if is_sharded(self.student):
            raise ValueError(
                "`student` is sharded, but OnPolicyDistillation samples in each process as long as its own responses "
                "are, while shards need the same forward passes in all of them; train with DDP or ZeRO-2, or give a "
                "LightningModule of your own."
            )
        self._user_defaults = UserDefaults()

    def on_train_start(self) -> None:
        """Update the teachers with the student at the start of the training."""
        self._update_teachers()

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the teachers with the student after an optimizer step."""
        self._update_teachers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the states of the teachers and of the gate."""
        checkpoint["odp_teachers"] = {}
        for name, teacher in self.teachers.items():
            with _saving_without(f"the teacher {name!r}"):
                checkpoint["odp_teachers"][name] = teacher.state_dict()
        gate: object = self.gate
        if isinstance(gate, Stateful):
            with _saving_without("`gate`"):
                checkpoint["odp_gate"] = gate.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the states of the teachers and of the gate."""
        saved_teachers = checkpoint.get("odp_teachers", {})
        for sentence in restore_teachers(self.teachers, saved_teachers):
            rank_zero_warn(f"odp-callbacks: {sentence}")
        gate: object = self.gate
        if not isinstance(gate, Stateful):
            return
        if "odp_gate" not in checkpoint:
            problem = "there is none"
        elif list(saved_teachers) != list(self.teachers):
            problem = f"it was learned from the teachers {list(saved_teachers)}"
        else:
            problem = load_or_keep(gate, checkpoint["odp_gate"])
        if problem:
            rank_zero_warn(f"odp-callbacks: `gate` starts anew: the checkpoint's state does not fit ({problem}).")

    def _update_teachers(self) -> None:
        for teacher in self.teachers.values():
            teacher.update(self.student, self.global_step)

    def _loss(self, student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor) -> Tensor:
        """The losses ``(T,)`` of a rollout's tokens, from logits ``(T, V)``; in float32 at least."""
        student_logits, teacher_logits = (
            logits.float() if logits.dtype != torch.float64 else logits for logits in (student_logits, teacher_logits)
        )
        if callable(self.divergence):
            return self.divergence(student_logits, teacher_logits)
        return distillation_loss(
            student_logits,
            teacher_logits,
            self.divergence,
            beta=self.beta,
            tokens=token_ids if self.divergence == "sampled_token" else None,
            top_k=self.top_k,
            temperature=self.temperature,
        )


@contextmanager
def _saving_without(owner: str) -> Iterator[None]:
    """Turn the failure of something that has a state into a warning: a checkpoint without it is better than none."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(
            f"odp-callbacks: a checkpoint is saved without the state of {owner}: {type(error).__name__}: {error}"
        )


def _in_order_of_depth(parts: Sequence[tuple[list[int], Tensor]], vocabulary: int) -> Tensor:
    """Join the logits ``(T', V)`` that several teachers gave at different depths of a rollout into ``(T, V')``."""
    if len(parts) == 1:
        return parts[0][1][:, :vocabulary]
    depths = torch.tensor([depth for part_depths, _ in parts for depth in part_depths])
    return torch.cat([logits[:, :vocabulary] for _, logits in parts])[depths.argsort()]
