"""A LightningModule for on-policy distillation, for those who have none of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from odp_callbacks.engine.directions import UserLoss
from odp_callbacks.engine.logits import node_logits
from odp_callbacks.engine.prompts import Row, as_questions, rows_from_batch
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.rollouts import Rollout, end_tokens, sample_rollouts, score_rollouts
from odp_callbacks.engine.teachers import as_teachers, teacher_logits, teacher_prompt_ids
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.functional.divergences import Divergence, check_divergence, distillation_loss
from odp_callbacks.functional.gradients import evaluating

Weights = Callable[[Sequence[Rollout]], Sequence[float] | Tensor]
"""From a batch of rollouts to weights ``(B,)``, one a rollout, or ``(B, T)``, one a token (padded to the longest)."""


class OnPolicyDistillation(LightningModule):
    """Train a student on its own rollouts to follow a teacher, token by token.

    Each training step samples responses from the student (without dropout), asks the teacher for its distribution at
    every token of them, and takes the mean distillation loss. Batches are lists of rows in TRL's convention
    (``DataLoader(rows, collate_fn=list)``), or mappings of columns.

    Args:
        student: Causal language model with LoRA (peft).
        tokenizer: Its tokenizer.
        teacher: A :class:`~odp_callbacks.engine.teachers.Teacher`, a model, ``"base"`` or a context template.
        divergence: ``"reverse_kl"``, ``"forward_kl"``, ``"jsd"``, ``"sampled_token"``, or a function
            ``f(student_logits, teacher_logits)`` from ``(N, V)`` to ``(N,)``.
        beta: For ``"jsd"``.
        top_k: Restricts the loss to that many tokens.
        temperature: Of sampling, and of both models in the loss.
        max_new_tokens: Limit of a response.
        rollouts_per_prompt: Responses to each row of a batch.
        eos_token_ids: More tokens that end a response.
        reward: TRL reward function; its mean is logged, and the weights see it.
        weights: What each rollout or token counts with in the loss; 1 by default. The loss is the weighted sum over
            tokens divided by their number.
        learning_rate: Of AdamW; override ``configure_optimizers`` for another optimizer.

    Raises:
        ValueError: If an option is out of range, or there is no end-of-sequence token.

    Example:
        >>> from odp_callbacks import OnPolicyDistillation
        >>> OnPolicyDistillation.__mro__[1].__name__
        'LightningModule'
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        teacher: object,
        *,
        divergence: Divergence | UserLoss = "reverse_kl",
        beta: float | None = None,
        top_k: int | None = None,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        rollouts_per_prompt: int = 1,
        eos_token_ids: tuple[int, ...] = (),
        reward: RewardFunction | None = None,
        weights: Weights | None = None,
        learning_rate: float = 1e-4,
    ) -> None:
        super().__init__()
        if not callable(divergence):
            check_divergence(divergence, beta, top_k)
        if max_new_tokens < 1 or rollouts_per_prompt < 1 or not temperature > 0:
            raise ValueError(
                "`max_new_tokens`, `rollouts_per_prompt` and `temperature` must be positive, but "
                f"{max_new_tokens!r}, {rollouts_per_prompt!r} and {temperature!r} were given."
            )
        self.student = student
        self.tokenizer = tokenizer
        (self.teacher,) = as_teachers([teacher]).values()
        self.teacher.check(student, tokenizer)
        self.divergence, self.beta, self.top_k, self.temperature = divergence, beta, top_k, temperature
        self.max_new_tokens, self.rollouts_per_prompt = max_new_tokens, rollouts_per_prompt
        self.eos_token_ids = end_tokens(student, tokenizer, eos_token_ids)
        self.reward, self.weights, self.learning_rate = reward, weights, learning_rate
        # What the callback's free mode looks at.
        self.last_rollouts: list[tuple[Row, tuple[int, ...]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sample rollouts, compare with the teacher, return the loss."""
        rollouts = self.sample(batch)
        self.last_rollouts = [(r.question.row, r.response_ids) for r in rollouts]
        losses, mask = self.token_losses(rollouts)
        weights = torch.ones_like(losses) if self.weights is None else self._weights(rollouts, losses)
        loss = (weights * losses * mask).sum() / mask.sum()
        size = len(rollouts)
        self.log("train/loss", loss.detach(), batch_size=size, prog_bar=True)
        self.log("train/response_tokens", mask.sum() / size, batch_size=size)
        if self.reward is not None:
            self.log("train/reward", sum(r.reward for r in rollouts) / size, batch_size=size, prog_bar=True)
        return loss

    def sample(self, batch: Any) -> list[Rollout]:
        """Student rollouts on a batch, scored if there is a reward function."""
        with torch.no_grad(), evaluating(self.student):
            rollouts = sample_rollouts(
                self.student,
                self.tokenizer,
                as_questions(rows_from_batch(batch), self.tokenizer),
                per_question=self.rollouts_per_prompt,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                eos_token_ids=self.eos_token_ids,
                generator=None,
                batch_size=256,
            )
        return rollouts if self.reward is None else score_rollouts(Verifier(self.reward), rollouts)

    def token_losses(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
        """Distillation loss of every response token.

        Returns:
            Losses ``(B, T)`` in nats, zero on padding, and the mask ``(B, T)`` of the tokens that are there.
        """
        responses = [r.response_ids for r in rollouts]
        depths = [range(len(r)) for r in responses]
        with evaluating(self.student):
            shown = [teacher_prompt_ids(self.teacher, self.tokenizer, r.question) for r in rollouts]
            taught = teacher_logits(self.teacher, self.student, shown, responses, depths)
        positions = [r.positions(d) for r, d in zip(rollouts, depths, strict=True)]
        own = node_logits(self.student, [r.sequence for r in rollouts], positions)
        losses = [
            self._loss(z[:, : q.shape[-1]], q, torch.tensor(response, device=z.device))
            for z, q, response in zip(own, taught, responses, strict=True)
        ]
        return (
            pad_sequence(losses, batch_first=True),
            pad_sequence([torch.ones_like(x) for x in losses], batch_first=True),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on whatever requires gradients."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)

    def on_train_start(self) -> None:
        """Tell the teacher where the student starts."""
        self.teacher.update(self.student, self.global_step)

    def on_train_batch_end(self, *args: Any) -> None:
        """Tell the teacher of the optimizer's step."""
        self.teacher.update(self.student, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the teacher's own state."""
        checkpoint["odp_teacher"] = self.teacher.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the teacher's own state."""
        self.teacher.load_state_dict(checkpoint["odp_teacher"])

    def _loss(self, student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
        """``(T, V)`` and ``(T,)`` to ``(T,)``, in float32 at least."""
        z, q = (x.float() if x.dtype != torch.float64 else x for x in (student_logits, teacher_logits))
        if callable(self.divergence):
            return self.divergence(z, q)
        return distillation_loss(
            z,
            q,
            self.divergence,
            beta=self.beta,
            tokens=tokens if self.divergence == "sampled_token" else None,
            top_k=self.top_k,
            temperature=self.temperature,
        )

    def _weights(self, rollouts: Sequence[Rollout], losses: Tensor) -> Tensor:
        """Weights ``(B, T)`` or ``(B, 1)`` on the losses' device."""
        assert self.weights is not None
        weights = torch.as_tensor(self.weights(rollouts)).to(losses)
        if weights.dim() == 1:
            weights = weights[:, None]
        if weights.shape not in (losses.shape, (len(losses), 1)):
            raise ValueError(
                f"`weights` must give {len(losses)} weights, or a tensor of shape {tuple(losses.shape)}, "
                f"but its shape is {tuple(weights.shape)}."
            )
        return weights
