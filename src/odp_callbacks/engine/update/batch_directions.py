"""What success and each teacher ask for on the hidden states of a batch of rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.loss_directions import Direction
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.model_forward import check_embedded
from odp_callbacks.engine.teachers import ServedTeacher, Teacher, teacher_prompt_ids
from odp_callbacks.engine.update.backward import vector_jacobian_products
from odp_callbacks.engine.update.split_model import SplitModel, logits_at_a_time
from odp_callbacks.functional.returned_tokens import ReturnedTokens
from odp_callbacks.functional.tokens import policy_features
from odp_callbacks.functional.top_k import top_k_predictors

TeacherStates = Tensor | ReturnedTokens
"""What is kept of a teacher for the tokens of a batch: hidden states ``(N, H')``, or what its server returned."""


@dataclass(frozen=True)
class BatchDirections:
    """What the success of a batch of rollouts and each teacher ask for, on the hidden states.

    Attributes:
        cotangents: ``(1 + K, N, H)``: success, then each teacher, for the ``N`` response tokens of the batch.
        norms: ``(K, N)`` float32, the norm of each token's distillation direction on the logits.
        features: ``(9, K, N)`` float32 on the CPU, what is known about each token: the values of
            :func:`~odp_callbacks.functional.tokens.policy_features`, about which rules may ask, and then those of
            :func:`~odp_callbacks.functional.top_k.top_k_predictors`, in their order; None if not asked for.
    """

    cotangents: Tensor
    norms: Tensor
    features: Tensor | None = None

    def cpu(self) -> "BatchDirections":
        """The same, where many batches can be kept."""
        return BatchDirections(self.cotangents.cpu(), self.norms, self.features)

    def part(self, tokens: Tensor) -> "BatchDirections":
        """Those of some tokens, by their indices ``(n,)`` int64 on the CPU."""
        features = None if self.features is None else self.features[:, :, tokens]
        cotangents = self.cotangents[:, tokens.to(self.cotangents.device)]
        return BatchDirections(cotangents, self.norms[:, tokens], features)


class DirectionsOfBatches:
    """Computes directions on the hidden states of a student; logits exist for a few positions at a time.

    Args:
        model: The student, body and head apart.
        tokenizer: Its tokenizer.
        teachers: By name.
        direction: Descent direction of the distillation loss on the logits.
        temperature: Of the policy that was sampled.
        features: Also compute what rules may ask about each token.
        max_memory_bytes: Limit for logits on an accelerator; None for half of what is free.
    """

    def __init__(
        self,
        model: SplitModel,
        tokenizer: Any,
        teachers: Mapping[str, Teacher],
        direction: Direction,
        temperature: float,
        features: bool,
        max_memory_bytes: float | None = None,
    ) -> None:
        self.model, self.tokenizer, self.teachers = model, tokenizer, teachers
        self.direction, self.temperature, self._features = direction, temperature, features
        self.max_memory_bytes = max_memory_bytes
        self._models: dict[int, SplitModel] = {}

    def teacher_states(self, rollouts: Sequence[Rollout], segments: Sequence[int]) -> list[TeacherStates]:
        """Run each teacher once over a batch.

        Args:
            rollouts: ``B`` rollouts with at least one token each.
            segments: ``B`` numbers: rollouts of different segments stay in different sequences of the student.

        Returns:
            For each teacher its hidden states ``(N, H')`` at the positions that choose the response tokens, or what
            its server returned there.
        """
        with torch.inference_mode(False), torch.no_grad():
            return [self._teacher_states(*teacher, rollouts, segments) for teacher in self.teachers.items()]

    def _teacher_states(
        self, name: str, teacher: Teacher, rollouts: Sequence[Rollout], segments: Sequence[int]
    ) -> TeacherStates:
        prompts, responses = [], [rollout.response_ids for rollout in rollouts]
        for rollout in rollouts:
            prompt_ids = rollout.question.teacher_prompt_ids.get(name)
            if prompt_ids is None:
                prompt_ids = teacher_prompt_ids(teacher, self.tokenizer, rollout.question)
            prompts.append(prompt_ids.cpu())
        if isinstance(teacher, ServedTeacher):
            depths = [range(len(response)) for response in responses]
            return ReturnedTokens.concatenate(teacher.returned_tokens(prompts, responses, depths))
        # A teacher that reads what the student reads does so in the same batch, so that equal policies give equal bits.
        same = all(torch.equal(p, r.question.prompt_ids.cpu()) for p, r in zip(prompts, rollouts, strict=True))
        sequences = [
            torch.cat([prompt, torch.tensor(response[:-1], dtype=torch.long)])
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        with teacher.policy(self.model.model) as (model, replacements):
            check_embedded(model, sequences, "a response that the student sampled and one of `teachers` reads")
            split = self._split(model)
            layout = split.layout(prompts, responses, segments if same else [0] * len(rollouts))
            if layout is not None:
                return split.run(layout, replacements)
            positions = [
                [len(prompt) - 1 + depth for depth in range(len(response))]
                for prompt, response in zip(prompts, responses, strict=True)
            ]
            return split.hidden_states(sequences, positions, replacements)

    @torch.no_grad()
    def on_hidden_states(
        self,
        hidden: Tensor,
        rollouts: Sequence[Rollout],
        advantages: Sequence[float],
        teacher_states: Sequence[TeacherStates],
    ) -> BatchDirections:
        """Send the directions on the logits back through the head, some positions at a time.

        Args:
            hidden: ``(N, H)``, of the student.
            rollouts: ``B`` rollouts.
            advantages: ``B`` factors of the direction of success.
            teacher_states: From :meth:`teacher_states`.
        """
        device = hidden.device
        tokens = torch.tensor([token for rollout in rollouts for token in rollout.response_ids], device=device)
        factors = torch.tensor(
            [a for a, rollout in zip(advantages, rollouts, strict=True) for _ in rollout.response_ids],
            dtype=torch.float32,
            device=device,
        )
        cotangents = hidden.new_zeros(1 + len(teacher_states), *hidden.shape)
        norms = torch.zeros(len(teacher_states), len(tokens), dtype=torch.float32)
        features: list[Tensor] = []
        vocabulary = self.model.logits(hidden[:1]).shape[-1]
        size = max(1, logits_at_a_time(device, self.max_memory_bytes) // vocabulary)
        for first in range(0, len(tokens), size):
            chunk = slice(first, first + size)
            with torch.enable_grad():
                states = hidden[chunk].detach().requires_grad_()
                logits = self.model.logits(states)  # (n, V)
            theirs = [states_[chunk] for states_ in teacher_states]
            directions, of_chunk = self._directions_on_logits(logits.detach(), tokens[chunk], factors[chunk], theirs)
            features += of_chunk
            norms[:, chunk] = directions[1:].norm(dim=-1).float().cpu()
            if not self.model.splits:
                cotangents[:, chunk] = directions.to(cotangents)
            else:
                (cotangents[:, chunk],) = vector_jacobian_products(logits, [states], directions)
        return BatchDirections(cotangents, norms, torch.cat(features, dim=2) if features else None)

    def _directions_on_logits(
        self, logits: Tensor, tokens: Tensor, factors: Tensor, teacher_states: Sequence[TeacherStates]
    ) -> tuple[Tensor, list[Tensor]]:
        """``(1 + K, n, V)``: the direction of success, then each teacher's; and ``(9, K, n)``, the tokens' features."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        success = -torch.softmax(z / self.temperature, dim=-1)
        success[torch.arange(len(tokens), device=z.device), tokens] += 1
        directions = [success * (factors.to(z) / self.temperature)[:, None]]
        features = []
        for teacher, states in zip(self.teachers.values(), teacher_states, strict=True):
            if isinstance(states, ReturnedTokens):
                teacher_logits = states.logits(z)
            else:
                with teacher.policy(self.model.model) as (model, replacements):
                    teacher_logits = self._split(model).logits(states, replacements)[..., : z.shape[-1]]
            directions.append(self.direction(z, teacher_logits.to(z), tokens))
            if self._features:
                shared = z[..., : teacher_logits.shape[-1]]
                of_teacher = {
                    **policy_features(shared, teacher_logits.to(z), tokens, self.temperature),
                    **top_k_predictors(shared, teacher_logits.to(z), self.temperature),
                }
                features.append(torch.stack(list(of_teacher.values())).float().cpu())
        return torch.stack(directions), [torch.stack(features, dim=1)] if features else []

    def _split(self, model: nn.Module) -> SplitModel:
        if model is self.model.model:
            return self.model
        if id(model) not in self._models:
            self._models[id(model)] = SplitModel(model)
        return self._models[id(model)]
