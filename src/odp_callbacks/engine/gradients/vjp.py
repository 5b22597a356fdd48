"""Vector-Jacobian products: from directions on the logits of a rollout's nodes to gradients on the LoRA parameters.

Let ``J_u`` be the Jacobian of the logits at node ``u`` with respect to the LoRA parameters. A direction ``v`` on these
logits corresponds to the gradient ``J_u^T v`` on the parameters, a vector-Jacobian product. One backward pass that
starts at the logits with ``v`` computes it, and the Jacobian itself is never formed.

One forward pass serves all nodes of a rollout. It runs in segments that end at nodes. Each segment attends to the keys
and values of the segments before it and keeps their autograd graph, so the backward pass from a node visits the tokens
up to the end of its own segment only. The directions of all nodes of a segment go through the backward pass as one
batch.

That holds the graph of all layers, with attention weights for each pair of tokens. Where it does not fit into memory,
:mod:`~odp_callbacks.engine.gradients.recomputed_vjp` computes the same gradients with the graph of one layer at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.gradients.gram_matrices import NodeGrams, ScaledDirections
from odp_callbacks.engine.gradients.graph_memory import max_directions, recomputes_layers
from odp_callbacks.engine.gradients.graph_trial import graph_verdict
from odp_callbacks.engine.gradients.recomputed_vjp import recomputed_gram_matrices, recomputed_sums
from odp_callbacks.engine.gradients.segments import segment_ends
from odp_callbacks.engine.sampling.backend_selection import SELECTION, independent_groups
from odp_callbacks.engine.sampling.model_forward import forward_with_cache
from odp_callbacks.engine.sampling.rotary_state import dynamic_rotaries, forget_lengths
from odp_callbacks.functional.gradients import flatten_gradients, logits_at, lora_parameters

PASS_OVERHEAD = {"cpu": 32}
"""Cost of one pass through the model beyond that of its tokens, in tokens, by type of device."""
ACCELERATOR_PASS_OVERHEAD = 512
"""The same on other devices, where a pass waits for its kernels to be launched."""


@dataclass(frozen=True)
class _Segment:
    """A part of a sequence.

    Attributes:
        nodes: Indices of the nodes that lie in it.
        logits: ``(N_s, V)``, their logits, with the autograd graph.
        end: Position after its last token.
    """

    nodes: list[int]
    logits: Tensor
    end: int


@dataclass(frozen=True)
class _SegmentedForward:
    """A forward pass over one sequence, ready for backward passes.

    Attributes:
        parameters: The LoRA parameters that it was run with, as leaves of the autograd graph.
        segments: The segments, in order; to be read once.
    """

    parameters: dict[str, Tensor]
    segments: Iterable[_Segment]


def node_gram_matrices(
    model: nn.Module,
    input_ids: Tensor,
    positions: Sequence[int],
    cotangents: Sequence[Tensor],
    *,
    max_memory_bytes: float | None = None,
    ends: Sequence[int] | None = None,
    square_roots: Mapping[str, Tensor] | None = None,
) -> NodeGrams:
    r"""Gram matrices of the gradients :math:`J_u^\top v_c` at each node of one sequence, for each module.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions whose logits decide the next token.
        cotangents: ``(C_n, V)`` floating for each node: its directions :math:`v_c`.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.
        ends: Ends of the segments; None for the cheapest ones
            (:func:`~odp_callbacks.engine.gradients.segments.segment_ends`).
        square_roots: Also return the Gram matrices of gradients that are multiplied by these, by parameter name
            (:meth:`~odp_callbacks.engine.gradients.preconditioner.Preconditioner.square_roots`).

    Returns:
        The Gram matrices of each node, and what else was asked for.
    """
    directions = [ScaledDirections.of(cotangent) for cotangent in cotangents]
    verdict = graph_verdict(model)
    recomputes = recomputes_layers(model, verdict, max(positions) + 1, max_memory_bytes)
    if ends is None:
        ends = _cheapest_ends(model, positions, [len(of_node.nonzero) for of_node in directions], repeats=recomputes)
    if recomputes:
        return recomputed_gram_matrices(
            model,
            input_ids,
            positions,
            directions,
            _segments_of_nodes(model, positions, ends),
            max_memory_bytes=max_memory_bytes,
            square_roots=square_roots,
            fresh_graphs=not verdict.reusable,
        )
    grams: list[Tensor] = [torch.empty(0)] * len(directions)
    preconditioned: list[Tensor] = [] if square_roots is None else [torch.empty(0)] * len(directions)
    with _segmented_forward(model, input_ids, positions, ends) as forward_pass:
        parameter_names = list(forward_pass.parameters)
        for segment in forward_pass.segments:
            batch_size = max_directions(model, segment.end, segment.logits.numel(), max_memory_bytes)
            parameters = list(forward_pass.parameters.values())
            node_gradients = _segment_gradients(segment, parameters, directions, batch_size)
            for node_index, gradients in zip(segment.nodes, node_gradients, strict=True):
                grams[node_index] = directions[node_index].gram_matrices(gradients, parameter_names)
                if square_roots is not None:
                    scaled_gradients = [
                        gradient * square_roots[name].flatten()
                        for name, gradient in zip(parameter_names, gradients, strict=True)
                    ]
                    preconditioned[node_index] = directions[node_index].gram_matrices(scaled_gradients, parameter_names)
    return NodeGrams(grams, preconditioned)


def summed_vjps(
    model: nn.Module,
    input_ids: Tensor,
    positions: Sequence[int],
    cotangents: Tensor,
    max_memory_bytes: float | None = None,
) -> Tensor:
    r"""Sums :math:`\sum_u J_u^\top v_u` over the nodes of one sequence, for several choices of :math:`v`.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions.
        cotangents: ``(D, N, V)``: for each sum, one direction on the logits of each node.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.

    Returns:
        ``(D, P)`` float32.
    """
    cotangents = cotangents.double()
    scale = cotangents.abs().amax(dim=(1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
    scaled_cotangents = cotangents / scale[:, None, None]
    verdict = graph_verdict(model)
    if recomputes_layers(model, verdict, max(positions) + 1, max_memory_bytes):
        parts = [
            recomputed_sums(
                model,
                input_ids,
                [positions[index] for index in nodes],
                scaled_cotangents[:, nodes],
                fresh_graphs=not verdict.reusable,
            ).float()
            for nodes in independent_groups(model, [position + 1 for position in positions])
        ]
        return sum(parts[1:], parts[0]) * scale[:, None].to(parts[0].device).float()
    with _segmented_forward(model, input_ids, positions, [max(positions) + 1]) as forward_pass:
        parts = []
        for segment in forward_pass.segments:
            of_segment = scaled_cotangents[:, segment.nodes].to(segment.logits)
            batch_size = max_directions(model, segment.end, segment.logits.numel(), max_memory_bytes)
            batches = [
                _batched_vjps(segment.logits, list(forward_pass.parameters.values()), batch)
                for batch in of_segment.split(batch_size)
            ]
            parts.append(torch.cat([flatten_gradients(batch, forward_pass.parameters).float() for batch in batches]))
    total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
    return total * scale[:, None].to(total.device).float()


def _segments_of_nodes(model: nn.Module, positions: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
    """The nodes of each segment; segments whose logits depend on the total length are split further."""
    groups = independent_groups(model, [position + 1 for position in positions])
    if len(groups) > 1:
        return groups
    bounds = pairwise([0, *ends])
    found = [[node for node, position in enumerate(positions) if start <= position < end] for start, end in bounds]
    return [nodes for nodes in found if nodes]


def _cheapest_ends(
    model: nn.Module, positions: Sequence[int], direction_counts: Sequence[int], *, repeats: bool
) -> list[int]:
    """Ends of the segments; one segment for a model that cannot continue on a cache of its own and would have to."""
    if not repeats and not SELECTION.verdict(model, min(positions) + 1, max(positions) + 1).segments:
        return [max(positions) + 1]
    overhead = PASS_OVERHEAD.get(next(model.parameters()).device.type, ACCELERATOR_PASS_OVERHEAD)
    return segment_ends(positions, direction_counts, overhead, repeats=repeats)


@contextmanager
def _segmented_forward(
    model: nn.Module, input_ids: Tensor, positions: Sequence[int], ends: Sequence[int]
) -> Iterator[_SegmentedForward]:
    """Run ``model`` up to the last of ``ends`` in segments that end there, with an autograd graph.

    Where the logits depend on the total length, the segments are separate forward passes over prefixes instead, each
    from the first token to the last node for which its logits are those of the node's prefix alone.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    groups = independent_groups(model, [position + 1 for position in positions])
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in lora_parameters(model).items()}
    batched_ids = input_ids.to(device)[None]  # (1, T)
    segments = []
    # Backward passes can be batched over directions only through the plain kernel of scaled dot product attention.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if len(groups) > 1:
            yield _SegmentedForward(parameters, _prefix_segments(model, batched_ids, positions, groups, parameters))
            return
        cache = DynamicCache()
        for start, end in pairwise([0, *ends]):
            node_indices = [index for index, position in enumerate(positions) if start <= position < end]
            offsets = torch.tensor([positions[index] - start for index in node_indices], device=device)
            if len(ends) == 1:
                logits = logits_at(model, batched_ids[:, :end], offsets, parameters=parameters)
            else:
                logits = forward_with_cache(
                    model, batched_ids[:, start:end], cache, logit_positions=offsets, parameters=parameters
                )
            segments.append(_Segment(node_indices, logits[0], end))
        yield _SegmentedForward(parameters, segments)


def _prefix_segments(
    model: nn.Module,
    batched_ids: Tensor,
    positions: Sequence[int],
    groups: Sequence[Sequence[int]],
    parameters: dict[str, Tensor],
) -> Iterator[_Segment]:
    """Yield one forward pass after the other, so that only one graph is held at a time."""
    rotaries = dynamic_rotaries(model)
    for group in groups:
        forget_lengths(rotaries)
        of_group = [positions[index] for index in group]
        end = of_group[-1] + 1
        logits = logits_at(model, batched_ids[:, :end], batched_ids.new_tensor(of_group), parameters=parameters)
        yield _Segment(list(group), logits[0], end)


def _segment_gradients(
    segment: _Segment, parameters: list[Tensor], directions: Sequence[ScaledDirections], batch_size: int
) -> list[list[Tensor]]:
    """Gradients of the scaled nonzero directions of a segment's nodes, in batches that may span several nodes.

    Args:
        segment: The segment.
        parameters: The parameters to differentiate by.
        directions: Those of every node of the sequence.
        batch_size: Directions in one backward pass, at most.

    Returns:
        For each node of the segment and each parameter, ``(C', size)``; zeros where the parameter was not used.
    """
    logits = segment.logits
    requests = [
        (place, node_index, direction_index)
        for place, node_index in enumerate(segment.nodes)
        for direction_index in directions[node_index].nonzero
    ]
    batches: list[list[Tensor]] = [[parameter.new_zeros(0, parameter.numel())] for parameter in parameters]
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        cotangents = logits.new_zeros(len(batch), *logits.shape)  # (C, N_s, V)
        for batch_index, (place, node_index, direction_index) in enumerate(batch):
            cotangents[batch_index, place] = directions[node_index].scaled(direction_index).to(logits)
        gradients = _batched_vjps(logits, parameters, cotangents)
        for parts, gradient, parameter in zip(batches, gradients, parameters, strict=True):
            if gradient is None:
                gradient = parameter.new_zeros(len(batch), *parameter.shape)
            parts.append(gradient.flatten(1))
    direction_counts = [len(directions[node_index].nonzero) for node_index in segment.nodes]
    by_parameter = [torch.cat(parts).split(direction_counts) for parts in batches]
    return [list(of_node) for of_node in zip(*by_parameter, strict=True)]


def _batched_vjps(logits: Tensor, parameters: list[Tensor], cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients ``(C, *shape)`` for ``cotangents`` ``(C, N, V)`` on ``logits``, in one batch if the layers allow it."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        return torch.autograd.grad(logits, parameters, cotangents, is_grads_batched=True, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # A custom layer (for quantised weights, for example) may have a backward that takes no batch of directions.
        rows = [torch.autograd.grad(logits, parameters, cotangent, **options) for cotangent in cotangents]
        return tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))
