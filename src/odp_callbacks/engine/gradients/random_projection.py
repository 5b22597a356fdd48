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
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.gradients.vjp import max_directions
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.backend_selection import independent_groups
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.sampling.rotary_state import FixedRotaries
from odp_callbacks.functional.gradients import logits_at, lora_parameters

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
    device = next(model.parameters()).device
    parameters = {name: parameter.detach() for name, parameter in lora_parameters(model).items()}
    groups = independent_groups(model, [position + 1 for position in positions])
    order = torch.tensor([index for group in groups for index in group], device=device)
    rotaries = FixedRotaries(model)
    for group in groups:
        rotaries.prepare(positions[group[-1]] + 1)
    visited_ids = input_ids.to(device)[None, : max(positions) + 1]

    def logits(values: dict[str, Tensor]) -> Tensor:
        parts = []
        for group in groups:  # one, unless the logits depend on the total length
            of_group = [positions[index] for index in group]
            visited = visited_ids[:, : of_group[-1] + 1]
            with rotaries.at(visited.shape[1]):
                parts.append(logits_at(model, visited, visited.new_tensor(of_group), parameters=values)[0])
        return torch.cat(parts)[torch.argsort(order)]  # (N, V)

    def jacobian_vector_product(tangent: dict[str, Tensor]) -> Tensor:
        product: Tensor = torch.func.jvp(logits, (parameters,), (tangent,))[1]
        return product

    sketch_parts: list[list[Tensor]] = [[] for _ in cotangents]
    batch_size = max_directions(model, visited_ids.shape[1], len(positions) * cotangents[0].shape[-1], max_memory_bytes)
    with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for first in range(0, projections, batch_size):
            tangents = _random_signs(parameters, min(batch_size, projections - first), generator)
            if square_roots is not None:
                # The product of a scaled gradient with signs is that of the gradient with scaled signs.
                tangents = {name: signs * square_roots[name].to(signs) for name, signs in tangents.items()}
            products = torch.func.vmap(jacobian_vector_product)(tangents)  # (k, N, V)
            for node_index, directions in enumerate(cotangents):
                coordinates = directions.to(device).double() @ products[:, node_index].double().mT  # (C, k)
                sketch_parts[node_index].append(coordinates)
    sketches = [torch.cat(node_parts, dim=1) for node_parts in sketch_parts]  # (C, K) each
    return [(sketch @ sketch.mT)[None].cpu() / projections for sketch in sketches]


def _random_signs(parameters: Mapping[str, Tensor], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``(count, *shape)`` of -1 and 1 for each parameter."""
    return {
        name: torch.randint(2, (count, *parameter.shape), generator=generator).to(parameter) * 2 - 1
        for name, parameter in parameters.items()
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
