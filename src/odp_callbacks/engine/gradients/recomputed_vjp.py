"""Vector-Jacobian products for nodes of long sequences, in memory that grows linearly with their length.

One forward pass without a graph up to the end of a segment serves its nodes. The directions go through the head a few
positions at a time, and then through the layers by :class:`~odp_callbacks.engine.gradients.layer_tape.LayerTape`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from odp_callbacks.engine.attention_plans import without_attention_plans
from odp_callbacks.engine.gradients.gram_matrices import (
    NodeGrams,
    ScaledDirections,
    lora_modules,
    module_gram_matrices,
)
from odp_callbacks.engine.gradients.layer_sizes import layer_sizes
from odp_callbacks.engine.gradients.layer_tape import LayerTape
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.update.batches import parts_within
from odp_callbacks.engine.update.split_model import MAXIMUM_LOGITS, SplitModel, head_has_lora
from odp_callbacks.engine.update.token_layout import layout_of_sequences
from odp_callbacks.functional.gradients import lora_parameters

DIRECTION_COPIES = 3
"""Hidden states of the size of a sequence that each direction on its way through a layer takes."""


@contextmanager
def differentiable_states(
    model: nn.Module, input_ids: Tensor, positions: Sequence[int], *, fresh_graphs: bool = False
) -> Iterator[tuple[SplitModel, dict[str, Tensor], LayerTape]]:
    """Run the body of a model over one sequence, ready for backward passes within the block.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions.
        fresh_graphs: As of :class:`~odp_callbacks.engine.gradients.layer_tape.LayerTape`.

    Yields:
        The model in two parts, its LoRA parameters as leaves of the graph, and the tape, whose outputs are the hidden
        states ``(N, H)``; logits ``(N, V)`` if the model does not split.
    """
    split = SplitModel(model, split=not head_has_lora(model))
    layout = layout_of_sequences([input_ids[: max(positions) + 1]], [positions])
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in lora_parameters(model).items()}
    with without_attention_plans(), torch.inference_mode(False), torch.enable_grad():
        tape = LayerTape(model, lambda: split.run(layout, leaves), leaves, fresh_graphs=fresh_graphs)
        yield split, leaves, tape


def recomputed_gram_matrices(
    model: nn.Module,
    input_ids: Tensor,
    positions: Sequence[int],
    directions: Sequence[ScaledDirections],
    segments: Sequence[Sequence[int]],
    *,
    max_memory_bytes: float | None,
    square_roots: Mapping[str, Tensor] | None,
    fresh_graphs: bool,
) -> NodeGrams:
    """Gram matrices at each node of one sequence, with the graph of one layer at a time.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions.
        directions: Those of each node.
        segments: The nodes of each segment. A segment is read up to its last node.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.
        square_roots: As of :func:`~odp_callbacks.engine.gradients.vjp.node_gram_matrices`.
        fresh_graphs: As of :class:`~odp_callbacks.engine.gradients.layer_tape.LayerTape`.
    """
    modules = lora_modules(list(lora_parameters(model)))
    grams = [torch.empty(0)] * len(directions)
    preconditioned = [torch.empty(0)] * (0 if square_roots is None else len(directions))
    for nodes in segments:
        of_segment = [positions[node] for node in nodes]
        with differentiable_states(model, input_ids, of_segment, fresh_graphs=fresh_graphs) as (split, leaves, tape):
            counts = [len(directions[node].nonzero) for node in nodes]
            limit = directions_in_memory(model, max(of_segment) + 1, max_memory_bytes)
            for batch in parts_within(range(len(nodes)), counts, limit):
                chosen = [directions[nodes[place]] for place in batch]
                cotangents = torch.cat(
                    [_on_states(split, leaves, tape, place, own) for place, own in zip(batch, chosen, strict=True)]
                )
                of_batch = _module_grams(tape, cotangents, [counts[place] for place in batch], modules, square_roots)
                for place, own, found in zip(batch, chosen, of_batch, strict=True):
                    grams[nodes[place]] = own.unscaled(found[0])
                    if square_roots is not None:
                        preconditioned[nodes[place]] = own.unscaled(found[1])
    return NodeGrams(grams, preconditioned)


def recomputed_sums(
    model: nn.Module, input_ids: Tensor, positions: Sequence[int], cotangents: Tensor, *, fresh_graphs: bool
) -> Tensor:
    """Sums of gradients over the nodes of one sequence, with the graph of one layer at a time.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions.
        cotangents: ``(D, N, V)``: for each sum, one direction on the logits of each node.
        fresh_graphs: As of :class:`~odp_callbacks.engine.gradients.layer_tape.LayerTape`.

    Returns:
        ``(D, P)`` float32 or wider, on the CPU.
    """
    with differentiable_states(model, input_ids, positions, fresh_graphs=fresh_graphs) as (split, leaves, tape):
        return tape.flat_gradients(on_hidden_states(split, tape.outputs.detach(), cotangents, leaves))


def on_hidden_states(
    split: SplitModel, hidden: Tensor, cotangents: Tensor, parameters: Mapping[str, Tensor] | None
) -> Tensor:
    """Send directions on logits back through the head, a few positions at a time.

    Args:
        split: A model in two parts.
        hidden: ``(N, H)`` hidden states.
        cotangents: ``(C, N, V)`` directions on their logits.
        parameters: Replacements for parameters of the model.

    Returns:
        ``(C, N, H)``; the directions themselves if the model does not split.
    """
    if not split.splits or not len(hidden):
        return cotangents.to(hidden)
    parts = []
    for rows in torch.arange(len(hidden)).split(max(1, MAXIMUM_LOGITS // cotangents.shape[-1])):
        first, last = int(rows[0]), int(rows[-1]) + 1
        with torch.enable_grad():
            states = hidden[first:last].detach().requires_grad_()
            logits = split.logits(states, parameters)
        of_rows = [
            torch.autograd.grad(logits, states, cotangent.to(logits), retain_graph=True)[0]
            for cotangent in cotangents[:, first:last]
        ]
        parts.append(torch.stack(of_rows) if of_rows else hidden.new_zeros(0, *states.shape))
    return torch.cat(parts, dim=1)


def directions_in_memory(model: nn.Module, tokens: int, max_memory_bytes: float | None) -> int:
    """How many directions may go through a layer together, at least 1.

    Args:
        model: The student.
        tokens: Tokens of the sequence.
        max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.
    """
    parameter = next(model.parameters())
    of_direction = DIRECTION_COPIES * tokens * layer_sizes(model).hidden * max(4, parameter.element_size())
    return max(1, int(free_bytes(parameter.device, max_memory_bytes) / 2 // of_direction))


def _on_states(
    split: SplitModel, leaves: Mapping[str, Tensor], tape: LayerTape, place: int, directions: ScaledDirections
) -> Tensor:
    """The scaled nonzero directions of one node on the hidden states of its segment, ``(C', N_s, H)``."""
    hidden = tape.outputs.detach()
    if not len(directions.nonzero):
        return hidden.new_zeros(0, *hidden.shape)
    scaled = torch.stack([directions.scaled(index) for index in directions.nonzero])  # (C', V)
    of_node = on_hidden_states(split, hidden[place : place + 1], scaled[:, None], leaves)
    cotangents = hidden.new_zeros(len(scaled), *hidden.shape)
    cotangents[:, place] = of_node[:, 0]
    return cotangents


def _module_grams(
    tape: LayerTape,
    cotangents: Tensor,
    counts: Sequence[int],
    modules: Sequence[str],
    square_roots: Mapping[str, Tensor] | None,
) -> list[list[Tensor]]:
    """For each node ``(M, C', C')`` in one or two geometries; a layer's gradients are dropped once they are counted."""
    geometries = 1 if square_roots is None else 2
    grams_of_nodes = [
        [torch.zeros(len(modules), count, count, dtype=torch.float64) for _ in range(geometries)] for count in counts
    ]
    if not len(cotangents):
        return grams_of_nodes
    for part in tape.gradients(cotangents):
        names = list(part)
        of_nodes = [gradient.flatten(1).split(list(counts)) for gradient in part.values()]
        for node, sums in enumerate(grams_of_nodes):
            gradients = [of_parameter[node] for of_parameter in of_nodes]
            if gradients:
                sums[0] += module_gram_matrices(gradients, names, modules)
            if gradients and square_roots is not None:
                scaled = [g * square_roots[name].flatten() for name, g in zip(names, gradients, strict=True)]
                sums[1] += module_gram_matrices(scaled, names, modules)
    return grams_of_nodes
