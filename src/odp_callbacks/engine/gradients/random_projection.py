r"""Gram matrices of the gradients at a rollout's nodes by random projection, in forward mode.

Where every token of a long response is a node, a vector-Jacobian product for each direction of each node is expensive.
Instead, a tangent :math:`w` of random signs on the LoRA parameters goes through one forward pass for all nodes. For a
direction :math:`v` of node :math:`u`, :math:`\langle v, J_u w \rangle = \langle J_u^\top v, w \rangle` is then one
coordinate of a sketch of its gradient. With :math:`K` tangents the inner products of the sketches are unbiased, and a
cosine :math:`c` has a standard error of about :math:`(1 - c^2) / \sqrt{K}`. The sketches are of all LoRA parameters
together, not of each module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.graph_memory import useful_directions
from odp_callbacks.engine.gradients.recomputed_vjp import on_hidden_states
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.update.forward_mode import TangentMemory, tangents_of_states
from odp_callbacks.engine.update.split_model import SplitModel, head_has_lora
from odp_callbacks.functional.gradients import lora_parameters

TANGENT_COST = 1.6
"""Cost of a tangent relative to that of a direction in a backward pass over as many tokens.

Measured by ``benchmarks/projection.py``.
"""
ALL_MODULES = "all LoRA parameters"
"""The one module of a report whose gradients were projected."""


@dataclass(frozen=True)
class RandomProjection:
    """The random directions on which a probe projects gradients.

    Attributes:
        count: How many, ``K``.
        randomness: Draws them, independently for each rollout.
    """

    count: int
    randomness: Randomness

    def generator(self, rollout: Rollout) -> torch.Generator:
        """A new generator of the directions for one rollout; always in the same state."""
        return self.randomness.generator(rollout.question.id, "projection", rollout.response_ids)


def projected_gram_matrices(
    model: nn.Module,
    input_ids: Tensor,
    positions: Sequence[int],
    cotangents: Sequence[Tensor],
    projections: int,
    generator: torch.Generator,
    *,
    max_memory_bytes: float | None = None,
    square_roots: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    r"""Unbiased estimates of the Gram matrices of the gradients :math:`J_u^\top v_c` at each node of one sequence.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions whose logits decide the next token.
        cotangents: ``(C_n, V)`` floating for each node: its directions :math:`v_c`.
        projections: Number of tangents, ``K``.
        generator: Random stream of the tangents, on the CPU.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.
        square_roots: Multiply each parameter's gradient by these, as in
            :func:`~odp_callbacks.engine.gradients.vjp.node_gram_matrices`.

    Returns:
        ``(1, C_n, C_n)`` float64 on the CPU for each node.
    """
    split = SplitModel(model, split=not head_has_lora(model))
    parameters = {name: parameter.detach() for name, parameter in lora_parameters(model).items()}

    def states(values: dict[str, Tensor]) -> Tensor:
        return split.hidden_states([input_ids], [positions], values)  # (N, H)

    with torch.inference_mode(False), torch.no_grad():
        hidden = states(parameters)
        of_nodes = [
            _scaled_on_states(split, hidden[node : node + 1], own, parameters) for node, own in enumerate(cotangents)
        ]
        length = max(positions) + 1
        memory = TangentMemory.of(model, parameters)
        at_a_time = min(memory.directions(length, max_memory_bytes), useful_directions(model, length))
        scores = memory.scores(max_memory_bytes)
        sketch_parts: list[list[Tensor]] = [[] for _ in cotangents]
        for first in range(0, projections, at_a_time):
            tangents = _random_signs(parameters, min(at_a_time, projections - first), generator)
            if square_roots is not None:
                # The product of a scaled gradient with signs is that of the gradient with scaled signs.
                tangents = {name: signs * square_roots[name].to(signs) for name, signs in tangents.items()}
            products = tangents_of_states(states, model, parameters, tangents, scores=scores)  # (k, N, H)
            for node, (on_states, scales) in enumerate(of_nodes):
                coordinates = on_states.double() @ products[:, node].double().mT  # (C, k)
                sketch_parts[node].append(coordinates * scales.to(coordinates)[:, None])
    sketches = [torch.cat(node_parts, dim=1) for node_parts in sketch_parts]  # (C, K) each
    return [(sketch @ sketch.mT)[None].cpu() / projections for sketch in sketches]


def _scaled_on_states(
    split: SplitModel, hidden: Tensor, directions: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Directions on the logits of a node, ``(C, V)``, on its hidden state, ``(C, H)``, and their scales, ``(C,)``."""
    scales = directions.double().abs().amax(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    return on_hidden_states(split, hidden, (directions / scales[:, None])[:, None], parameters)[:, 0], scales


def _random_signs(parameters: Mapping[str, Tensor], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``(count, *shape)`` of -1 and 1 for each parameter; one tangent after the other, however many fit into memory."""
    drawn = [
        [torch.randint(2, p.shape, generator=generator, dtype=torch.int8) for p in parameters.values()]
        for _ in range(count)
    ]
    return {
        name: torch.stack(signs).to(parameter) * 2 - 1
        for (name, parameter), signs in zip(parameters.items(), zip(*drawn, strict=True), strict=True)
    }


class ProjectionSupport:
    """Finds out whether gradients of a model can be projected; tries each model once and remembers the result."""

    def __init__(self) -> None:
        self._supported: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def __call__(self, model: nn.Module) -> bool:
        """Whether every layer of ``model`` supports forward mode; some layers for quantised weights do not.

        Args:
            model: Student with LoRA, in evaluation mode.
        """
        from peft.tuners.lora.layer import ParamWrapper

        # peft's LoRA on plain parameters registers parametrizations during its forward, and must not fail in between.
        if any(isinstance(module, ParamWrapper) for module in model.modules()):
            return False
        if model not in self._supported:
            self._supported[model] = self._try(model)
        return self._supported[model]

    def _try(self, model: nn.Module) -> bool:
        """Whether one projection over two tokens succeeds."""
        input_ids, directions = torch.zeros(2, dtype=torch.long), torch.ones(1, vocabulary_size(model))
        try:
            projected_gram_matrices(model, input_ids, [1], [directions], 1, torch.Generator())
        except torch.OutOfMemoryError:
            raise  # this is no property of the model
        except (RuntimeError, NotImplementedError, ValueError):
            return False
        return True


supports_projection = ProjectionSupport()


def projection_is_cheaper(
    projections: int | None,
    lengths: Sequence[int],
    positions: Sequence[Sequence[int]],
    direction_counts: Sequence[Sequence[int]],
) -> bool:
    """Whether random projection is cheaper than exact vector-Jacobian products over the sequences of a probe.

    Args:
        projections: Number of tangents; None for no projection.
        lengths: Length of each sequence up to its last node, in tokens.
        positions: Positions of each sequence's nodes.
        direction_counts: Numbers of directions of each sequence's nodes.

    Examples:
        >>> projection_is_cheaper(256, [550], [range(50, 550)], [[7] * 500])
        True
        >>> projection_is_cheaper(256, [550], [[60, 100, 300, 549]], [[7] * 4])
        False
    """
    if projections is None:
        return False
    exact_cost = sum(
        position * count
        for of_sequence, counts in zip(positions, direction_counts, strict=True)
        for position, count in zip(of_sequence, counts, strict=True)
    )
    return TANGENT_COST * projections * sum(lengths) < exact_cost
