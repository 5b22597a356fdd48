"""A LightningModule for on-policy distillation, for those who have none of their own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from odp_callbacks.engine.gradients.logits import node_logits
from odp_callbacks.engine.gradients.loss_directions import UserLoss
from odp_callbacks.engine.prompts import Row, as_questions, rows_from_batch
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.rollouts import Rollout, end_tokens, sample_rollouts, score_rollouts
from odp_callbacks.engine.teachers import as_teachers, teacher_logits, teacher_prompt_ids
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.functional.divergences import Divergence, check_divergence, distillation_loss
from odp_callbacks.functional.gradients import evaluating
from odp_callbacks.gates.loss import check_gate, gate_loss, route
from odp_callbacks.gates.rules import everything
from odp_callbacks.gates.tokens import Gate, Router, Stateful, Tokens, policy_features, tokens_of


@dataclass(frozen=True)
class TokenLosses:
    """Losses of a batch of rollouts.

    Attributes:
        losses: ``(B, T)`` in nats, 0 on padding.
        mask: ``(B, T)``, 1 where there is a token.
        tokens: What a gate sees of them, in the order of ``losses[mask]``.
    """

    losses: Tensor
    mask: Tensor
    tokens: Tokens


class OnPolicyDistillation(LightningModule):
    """Train a student on its own rollouts to follow a teacher, token by token.

    Each training step samples responses from the student (without dropout), asks the teacher for its distribution at
    every token of them, and takes the mean distillation loss. Batches are lists of rows in TRL's convention
    (``DataLoader(rows, collate_fn=list)``), or mappings of columns.

    Args:
        student: Causal language model with LoRA (peft).
        tokenizer: Its tokenizer.
        teacher: A :class:`~odp_callbacks.engine.teachers.Teacher`, a model, ``"base"`` or a context template; or
            several by name, among which the ``gate`` chooses. A gate that learns from probes knows teachers by the
            names that they have in the callback: ``{"answer": Teacher(...)}``.
        divergence: ``"reverse_kl"``, ``"forward_kl"``, ``"jsd"``, ``"sampled_token"``, or a function
            ``f(student_logits, teacher_logits)`` from ``(N, V)`` to ``(N,)``.
        beta: For ``"jsd"``.
        top_k: Restricts the loss to that many tokens.
        temperature: Of sampling, and of both models in the loss.
        max_new_tokens: Limit of a response.
        rollouts_per_prompt: Responses to each row of a batch.
        eos_token_ids: More tokens that end a response.
        reward: TRL reward function; its mean is logged, and the gate sees it.
        gate: What each token weighs in the loss, and which teacher it has: see :mod:`odp_callbacks.gates`. The loss is
            the weighted mean over tokens. None: every token weighs the same.
        success_threshold: Reward from which a rollout counts as correct.
        learning_rate: Of AdamW; override ``configure_optimizers`` for another optimizer.

    Raises:
        ValueError: If an option is out of range, there is no end-of-sequence token, several teachers have no gate that
            chooses among them, or the gate needs what training does not know.

    Examples:
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
        gate: Gate | None = None,
        success_threshold: float = 1.0,
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
        self.teachers = as_teachers(teacher)
        for each in self.teachers.values():
            each.check(student, tokenizer)
        if gate is not None:
            check_gate(gate, rewards=reward is not None, teachers=tuple(self.teachers))
        if len(self.teachers) > 1 and not isinstance(gate, Router):
            raise ValueError(
                f"`teacher` gives {len(self.teachers)} teachers {list(self.teachers)}, but `gate` chooses none of them "
                "for a token; give `gate=TeacherRouter()`, or one teacher."
            )
        self.divergence, self.beta, self.top_k, self.temperature = divergence, beta, top_k, temperature
        self.max_new_tokens, self.rollouts_per_prompt = max_new_tokens, rollouts_per_prompt
        self.eos_token_ids = end_tokens(student, tokenizer, eos_token_ids)
        self.reward, self.gate, self.success_threshold = reward, gate, success_threshold
        self.learning_rate = learning_rate
        # What the callback's free mode looks at.
        self.last_rollouts: list[tuple[Row, tuple[int, ...]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sample rollouts, compare with the teacher, return the loss."""
        rollouts = self.sample(batch)
        self.last_rollouts = [(r.question.row, r.response_ids) for r in rollouts]
        taken = self.token_losses(rollouts)
        gated = gate_loss(everything if self.gate is None else self.gate, taken.losses, taken.mask, taken.tokens)
        size = len(rollouts)
        self.log("train/loss", gated.loss.detach(), batch_size=size, prog_bar=True)
        self.log("train/response_tokens", taken.mask.sum() / size, batch_size=size)
        if self.gate is not None:
            self.log_dict({f"train/{name}": value for name, value in gated.logs.items()}, batch_size=size)
        if self.reward is not None:
            self.log("train/reward", sum(r.reward for r in rollouts) / size, batch_size=size, prog_bar=True)
        return gated.loss

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
                randomness=None,
                batch_size=256,
            )
        return rollouts if self.reward is None else score_rollouts(Verifier(self.reward), rollouts)

    def token_losses(self, rollouts: Sequence[Rollout]) -> TokenLosses:
        """Distillation loss of every response token, by the teacher that it has."""
        responses = [r.response_ids for r in rollouts]
        depths = [range(len(r)) for r in responses]
        device = next(self.student.parameters()).device
        lengths = torch.tensor([len(r) for r in responses], device=device)
        mask = (torch.arange(int(lengths.max()), device=device) < lengths[:, None]).float()
        tokens = tokens_of(
            mask,
            None if self.reward is None else [r.reward for r in rollouts],
            [id(r.question) for r in rollouts],
            success_threshold=self.success_threshold,
            teachers=tuple(self.teachers),
        )
        tokens = route(self.gate, tokens)
        taught = self._taught(rollouts, depths, tokens)
        own = node_logits(
            self.student,
            [r.sequence for r in rollouts],
            [r.positions(d) for r, d in zip(rollouts, depths, strict=True)],
        )
        losses, seen = [], []
        for z, q, response in zip(own, taught, responses, strict=True):
            z, taken = z[:, : q.shape[-1]], torch.tensor(response, device=z.device)
            losses.append(self._loss(z, q, taken))
            if self.gate is not None:
                seen.append(policy_features(z, q.to(z), taken, self.temperature))
        found: dict[str, Any] = {name: torch.cat([s[name] for s in seen]) for name in (seen[0] if seen else ())}
        return TokenLosses(pad_sequence(losses, batch_first=True), mask, replace(tokens, **found))

    def _taught(self, rollouts: Sequence[Rollout], depths: Sequence[Sequence[int]], tokens: Tokens) -> list[Tensor]:
        """Each token's teacher's logits, ``(T, V')`` for each rollout; a teacher reads only the rollouts it teaches."""
        owners = [o.tolist() for o in tokens.need("teacher").split([len(d) for d in depths])]
        parts: list[list[tuple[list[int], Tensor]]] = [[] for _ in rollouts]
        with evaluating(self.student):
            for k, teacher in enumerate(self.teachers.values()):
                wanted = [[t for t in d if owner[t] == k] for d, owner in zip(depths, owners, strict=True)]
                here = [i for i, w in enumerate(wanted) if w]
                if here:
                    shown = [teacher_prompt_ids(teacher, self.tokenizer, rollouts[i].question) for i in here]
                    responses, asked = [rollouts[i].response_ids for i in here], [wanted[i] for i in here]
                    logits = teacher_logits(teacher, self.student, shown, responses, asked)
                    for i, rows in zip(here, logits, strict=True):
                        parts[i].append((wanted[i], rows))
        width = min(rows.shape[-1] for part in parts for _, rows in part)
        # Back into the order of depths, where several teachers share a rollout.
        return [
            torch.cat([rows[:, :width] for _, rows in part])[torch.tensor([t for ts, _ in part for t in ts]).argsort()]
            if len(part) > 1
            else part[0][1][:, :width]
            for part in parts
        ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on whatever requires gradients."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)

    def on_train_start(self) -> None:
        """Tell the teachers where the student starts."""
        self._update_teachers()

    def on_train_batch_end(self, *args: Any) -> None:
        """Tell the teachers of the optimizer's step."""
        self._update_teachers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what teachers and gate have learned."""
        checkpoint["odp_teachers"] = {name: teacher.state_dict() for name, teacher in self.teachers.items()}
        gate: object = self.gate
        if isinstance(gate, Stateful):
            checkpoint["odp_gate"] = gate.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what teachers and gate had learned."""
        for name, state in checkpoint["odp_teachers"].items():
            self.teachers[name].load_state_dict(state)
        gate: object = self.gate
        if isinstance(gate, Stateful):
            gate.load_state_dict(checkpoint["odp_gate"])

    def _update_teachers(self) -> None:
        for teacher in self.teachers.values():
            teacher.update(self.student, self.global_step)

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
