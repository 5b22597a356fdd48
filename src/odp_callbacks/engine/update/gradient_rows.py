r"""Success gradients and distillation gradients of a batch of rollouts, on the LoRA parameters.

For a rollout with the tokens :math:`y_t` the direction of success on the logits of position t is
:math:`(r - b)(e_{y_t} - p_t) / \tau`, the distillation direction of a teacher is :math:`d_t`. Both go back through one
graph: first through the head, a few hundred positions at a time, then through the body. Forward mode gives the
influence of every token: the tangent of the hidden states along a success gradient, times the token's direction.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.gradients.loss_directions import Direction
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.model_forward import check_embedded
from odp_callbacks.engine.teachers import Teacher, teacher_prompt_ids
from odp_callbacks.engine.update.split_model import SplitModel
from odp_callbacks.functional.gradients import lora_parameters

MAXIMUM_LOGITS = 2**23
"""Logits of one model that are held at a time."""


@dataclass(frozen=True)
class BatchDirections:
    """What the success of a batch of rollouts and each teacher ask for, on the hidden states.

    Attributes:
        cotangents: ``(1 + K, N, H)``: success, then each teacher, for the ``N`` response tokens of the batch.
        norms: ``(K, N)`` float32, the norm of each token's distillation direction on the logits.
    """

    cotangents: Tensor
    norms: Tensor


class UpdateGradients:
    """Gradients and token influences of batches of rollouts.

    Args:
        student: Student with LoRA, in evaluation mode.
        tokenizer: Its tokenizer.
        teachers: By name.
        direction: Descent direction of the distillation loss on the logits.
        temperature: Of the policy that was sampled.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        teachers: Mapping[str, Teacher],
        direction: Direction,
        temperature: float,
    ) -> None:
        self.student, self.tokenizer, self.teachers = student, tokenizer, teachers
        self.direction, self.temperature = direction, temperature
        self._models: dict[int, SplitModel] = {}
        self._forward_mode = True
        # LoRA parameters of the head do not act through the hidden states: then the head belongs to the body.
        self.model = SplitModel(student, split=not self._head_has_lora())

    def rows(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float]
    ) -> tuple[dict[str, Tensor], BatchDirections]:
        """Compute the gradients of one batch.

        Args:
            rollouts: ``B`` rollouts with at least one token each.
            advantages: ``B`` factors of the success gradient: reward less baseline, over the rollouts of its question.

        Returns:
            For each LoRA parameter ``(1 + K, *shape)`` in float32 or wider: the success gradient, then the
            distillation gradient of each teacher, summed over the batch. And the directions on the hidden states.
        """
        parameters = {name: p.detach().requires_grad_() for name, p in lora_parameters(self.student).items()}
        with torch.inference_mode(False), torch.enable_grad():
            hidden = self._hidden_states(rollouts, parameters)
            directions = self._directions_on_hidden_states(hidden.detach(), rollouts, advantages)
            gradients = vector_jacobian_products(hidden, list(parameters.values()), directions.cotangents)
        wide = [g if g.dtype == torch.float64 else g.float() for g in gradients]
        return dict(zip(parameters, wide, strict=True)), directions

    def influences(
        self, rollouts: Sequence[Rollout], tangents: Mapping[str, Tensor], directions: BatchDirections | None = None
    ) -> Tensor:
        r"""Inner product of each token's distillation gradient with directions on the LoRA parameters.

        :math:`\langle s, J_t^\top d_t \rangle = \langle J_t s, d_t \rangle`: one forward-mode pass for all tokens and
        teachers of the batch.

        Args:
            rollouts: ``B`` rollouts.
            tangents: For each LoRA parameter ``(S, *shape)``: ``S`` directions.
            directions: Of the same batch, from :meth:`rows`; None computes them again.

        Returns:
            ``(S, K, N)`` float64 on the CPU.
        """
        with torch.inference_mode(False), torch.no_grad():
            if directions is None:
                hidden = self._hidden_states(rollouts, self._detached_parameters())
                directions = self._directions_on_hidden_states(hidden, rollouts, [0.0] * len(rollouts))
            if self._forward_mode:
                try:
                    return self._influences_by_forward_mode(rollouts, tangents, directions)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, NotImplementedError) as error:
                    self._forward_mode = False
                    warnings.warn(
                        "the student has a layer without forward-mode derivatives, so the influence of tokens takes "
                        f"one backward for each token: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
                        stacklevel=2,
                    )
            return self._influences_by_backward(rollouts, tangents, directions)

    def _influences_by_forward_mode(
        self, rollouts: Sequence[Rollout], tangents: Mapping[str, Tensor], directions: BatchDirections
    ) -> Tensor:
        """Push the tangents forward once for all tokens, ``(S, K, N)``."""
        parameters = self._detached_parameters()

        def states(values: dict[str, Tensor]) -> Tensor:
            return self._hidden_states(rollouts, values)

        def pushed_forward(tangent: dict[str, Tensor]) -> Tensor:
            pushed: Tensor = torch.func.jvp(states, (parameters,), (tangent,))[1]
            return pushed

        typed = {name: tangents[name].to(p) for name, p in parameters.items()}
        # Only the plain attention kernel has a forward mode.
        with sdpa_kernel(SDPBackend.MATH), without_input_gradient_hooks(self.student):
            moved = torch.func.vmap(pushed_forward)(typed)  # (S, N, H)
        return torch.einsum("snh,knh->skn", moved, directions.cotangents[1:].to(moved)).double().cpu()

    def _influences_by_backward(
        self, rollouts: Sequence[Rollout], tangents: Mapping[str, Tensor], directions: BatchDirections
    ) -> Tensor:
        """Send each token's directions back on their own, ``(S, K, N)``."""
        parameters = {name: p.requires_grad_() for name, p in self._detached_parameters().items()}
        teachers = directions.cotangents[1:]
        influences = torch.zeros(len(next(iter(tangents.values()))), *teachers.shape[:2], dtype=torch.float64)
        with torch.enable_grad():
            hidden = self._hidden_states(rollouts, parameters)
            for token in range(hidden.shape[0]):
                gradients = vector_jacobian_products(
                    hidden[token], list(parameters.values()), teachers[:, token], retain_graph=True
                )
                for (name, _), gradient in zip(parameters.items(), gradients, strict=True):
                    influences[..., token] += (
                        tangents[name].flatten(1).double().cpu() @ gradient.flatten(1).double().cpu().mT
                    )
        return influences

    def _detached_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in lora_parameters(self.student).items()}

    def _hidden_states(self, rollouts: Sequence[Rollout], parameters: Mapping[str, Tensor]) -> Tensor:
        """Hidden states of the student ``(N, H)`` at the positions that choose the response tokens."""
        positions = [rollout.positions(range(len(rollout.response_ids))) for rollout in rollouts]
        return self.model.hidden_states([r.sequence[:-1] for r in rollouts], positions, parameters)

    def _teacher_states(self, name: str, teacher: Teacher, rollouts: Sequence[Rollout]) -> Tensor:
        """Hidden states of a teacher ``(N, H')`` at the positions that choose the response tokens."""
        sequences, positions = [], []
        for rollout in rollouts:
            prompt_ids = rollout.question.teacher_prompt_ids.get(name)
            if prompt_ids is None:
                prompt_ids = teacher_prompt_ids(teacher, self.tokenizer, rollout.question)
            prompt_ids = prompt_ids.cpu()
            sequences.append(torch.cat([prompt_ids, torch.tensor(rollout.response_ids, dtype=torch.long)])[:-1])
            positions.append([len(prompt_ids) - 1 + depth for depth in range(len(rollout.response_ids))])
        with teacher.policy(self.student) as (model, replacements):
            check_embedded(model, sequences, "a response that the student sampled and one of `teachers` reads")
            return self._split(model).hidden_states(sequences, positions, replacements)

    @torch.no_grad()
    def _directions_on_hidden_states(
        self, hidden: Tensor, rollouts: Sequence[Rollout], advantages: Sequence[float]
    ) -> BatchDirections:
        """Send the directions on the logits back through the head, some positions at a time."""
        device = hidden.device
        tokens = torch.tensor([token for rollout in rollouts for token in rollout.response_ids], device=device)
        factors = torch.tensor(
            [a for a, rollout in zip(advantages, rollouts, strict=True) for _ in rollout.response_ids],
            dtype=torch.float32,
            device=device,
        )
        teacher_states = [self._teacher_states(*teacher, rollouts) for teacher in self.teachers.items()]
        cotangents = hidden.new_zeros(1 + len(teacher_states), *hidden.shape)
        norms = torch.zeros(len(teacher_states), len(tokens), dtype=torch.float32)
        size = max(1, MAXIMUM_LOGITS // self.model.logits(hidden[:1]).shape[-1])
        for first in range(0, len(tokens), size):
            chunk = slice(first, first + size)
            with torch.enable_grad():
                states = hidden[chunk].detach().requires_grad_()
                logits = self.model.logits(states)  # (n, V)
            theirs = [states_[chunk] for states_ in teacher_states]
            directions = self._directions_on_logits(logits.detach(), tokens[chunk], factors[chunk], theirs)
            norms[:, chunk] = directions[1:].norm(dim=-1).float().cpu()
            if not self.model.splits:
                cotangents[:, chunk] = directions.to(cotangents)
            else:
                (cotangents[:, chunk],) = vector_jacobian_products(logits, [states], directions)
        return BatchDirections(cotangents, norms)

    def _directions_on_logits(
        self, logits: Tensor, tokens: Tensor, factors: Tensor, teacher_states: Sequence[Tensor]
    ) -> Tensor:
        """``(1 + K, n, V)``: the direction of success, then each teacher's."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        success = -torch.softmax(z / self.temperature, dim=-1)
        success[torch.arange(len(tokens), device=z.device), tokens] += 1
        directions = [success * (factors.to(z) / self.temperature)[:, None]]
        for teacher, states in zip(self.teachers.values(), teacher_states, strict=True):
            with teacher.policy(self.student) as (model, replacements):
                teacher_logits = self._split(model).logits(states, replacements)[..., : z.shape[-1]]
            directions.append(self.direction(z, teacher_logits.to(z), tokens))
        return torch.stack(directions)

    def _split(self, model: nn.Module) -> SplitModel:
        if model is self.student:
            return self.model
        if id(model) not in self._models:
            self._models[id(model)] = SplitModel(model)
        return self._models[id(model)]

    def _head_has_lora(self) -> bool:
        head = getattr(self.student, "get_output_embeddings", lambda: None)()
        inside = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        return any(id(p) in inside for p in lora_parameters(self.student).values())


@contextmanager
def without_input_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Take out the hooks that make inputs require gradients, and put them back as they were.

    transformers and peft register them on the input embeddings for gradient checkpointing. A forward pass in forward
    mode cannot run them, and does not need them.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    hooks = {} if embeddings is None else embeddings._forward_hooks
    before = dict(hooks)
    try:
        for key, hook in before.items():
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del hooks[key]
        yield
    finally:
        hooks.clear()
        hooks.update(before)


def vector_jacobian_products(
    outputs: Tensor, leaves: list[Tensor], directions: Tensor, *, retain_graph: bool = False
) -> list[Tensor]:
    """Gradients ``(C, *shape)`` of ``outputs`` for directions ``(C, *outputs.shape)``, one backward each.

    A batch of rollouts fills the processor; several directions at once would only need more memory.

    Args:
        outputs: Any shape, with its graph.
        leaves: What it is differentiated by.
        directions: ``(C, *outputs.shape)``.
        retain_graph: Keep the graph for another call.
    """
    columns: list[list[Tensor]] = [[] for _ in leaves]
    for index, direction in enumerate(directions):
        gradients = torch.autograd.grad(
            outputs,
            leaves,
            direction.to(outputs),
            retain_graph=retain_graph or index + 1 < len(directions),
            allow_unused=True,
        )
        for column, gradient, leaf in zip(columns, gradients, leaves, strict=True):
            column.append(torch.zeros_like(leaf) if gradient is None else gradient)
    return [torch.stack(column) for column in columns]
