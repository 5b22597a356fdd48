"""Pulling directions on a rollout's nodes back to the LoRA parameters, and their Gram matrices.

One forward serves all nodes of a rollout. It runs in segments that end at nodes, each on the keys and values of those
before it, with their graph: so the backward from a node passes only what lies before it, and nothing of the rest of
the rollout. The directions of a segment's nodes go back together, as batched vector-Jacobian products.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from odp_callbacks.engine.sampling.backends import backend_of
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.sampling.prefix_cache import forward
from odp_callbacks.functional.gradients import flatten, logits_at, lora_parameters

MOST_SEGMENTS = 8
CANDIDATES = 64
"""The most places that are weighed as ends of segments."""
OVERHEAD = {"cpu": 32}
"""What one pass through the model costs beyond its tokens, in tokens."""
ELSEWHERE = 512
"""The same on an accelerator, where a pass waits for its kernels to be launched."""
ROWS = {"cpu": 2048}
"""Directions times tokens that go back together: more of them leave a CPU's cache."""


@dataclass(frozen=True)
class Graph:
    """A forward over one sequence that waits to be differentiated.

    Attributes:
        parameters: The LoRA parameters that it was run with.
        segments: Nodes by their place, and their logits ``(N_s, V)``; the graph of each ends at its last node.
        ends: Where each segment ends.
    """

    parameters: dict[str, Tensor]
    segments: list[tuple[list[int], Tensor]]
    ends: list[int]


class NodeGrams(NamedTuple):
    """What :func:`node_gram_matrices` finds.

    Attributes:
        grams: ``(M, C_n, C_n)`` float64 on the CPU, one for each node, one matrix for each of the ``M`` modules of
            :func:`lora_modules`; their sum over ``M`` is the Gram matrix on all LoRA parameters.
        sums: ``(last, P)`` float32, or None.
        preconditioned: The Gram matrices of the scaled gradients; empty where there is no scale.
    """

    grams: list[Tensor]
    sums: Tensor | None
    preconditioned: list[Tensor]


@contextmanager
def _graph(model: nn.Module, input_ids: Tensor, positions: Sequence[int], ends: Sequence[int]) -> Iterator[Graph]:
    """Run ``model`` up to the last of ``ends``, with gradients, in segments that end there."""
    device = next(model.parameters()).device
    parameters = {name: p.detach().requires_grad_() for name, p in lora_parameters(model).items()}
    ids = input_ids.to(device)[None]
    segments = []
    # Of the kernels for scaled dot product attention only the plain one can be batched over directions.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        cache = DynamicCache()
        for start, end in pairwise([0, *ends]):
            here = [n for n, p in enumerate(positions) if start <= p < end]
            at = torch.tensor([positions[n] - start for n in here], device=device)
            if len(ends) == 1:
                logits = logits_at(model, ids[:, :end], at, parameters=parameters)
            else:
                logits = forward(model, ids[:, start:end], cache, keep=at, parameters=parameters)
            segments.append((here, logits[0]))
        yield Graph(parameters, segments, list(ends))


def segment_ends(positions: Sequence[int], directions: Sequence[int], time_budget: float) -> list[int]:
    """Where to cut a sequence so that its backwards are cheapest.

    A direction of a node costs the tokens up to the end of its segment; each segment that a batch of them passes costs
    ``time_budget`` tokens more. The best cut at nodes is found by dynamic programming.

    Args:
        positions: ``N``, of the nodes.
        directions: ``N``, how many each has.
        time_budget: In tokens.

    Returns:
        Ends of the segments, each one after a node; the last after the last node.

    Examples:
        >>> segment_ends([10, 500, 501], [4, 4, 4], time_budget=32)
        [11, 502]
        >>> segment_ends([10, 500, 501], [4, 4, 4], time_budget=5000)
        [502]
    """
    at = sorted(set(positions))
    if len(at) > CANDIDATES:
        at = sorted({at[round(i * (len(at) - 1) / (CANDIDATES - 1))] for i in range(CANDIDATES)})
    below = [sum(d for p, d in zip(positions, directions, strict=True) if p <= end) for end in at]
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for j, end in enumerate(at, 1):
        for s in range(1, min(j, MOST_SEGMENTS) + 1):
            for i in range(s - 1, j):
                if (i, s - 1) not in best:
                    continue
                cost, ends = best[i, s - 1]
                # A forward and one backward through each of the segments so far.
                cost += (below[j - 1] - (below[i - 1] if i else 0)) * (end + 1) + 2 * s * time_budget
                if (j, s) not in best or cost < best[j, s][0]:
                    best[j, s] = cost, [*ends, end + 1]
    return min((found for (j, _), found in best.items() if j == len(at)), key=lambda found: found[0])[1]


def node_gram_matrices(
    model: nn.Module,
    input_ids: Tensor,
    positions: Sequence[int],
    cotangents: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    last: int = 0,
    memory: float | None = None,
    ends: Sequence[int] | None = None,
    roots: Mapping[str, Tensor] | None = None,
) -> NodeGrams:
    r"""Gram matrices of :math:`J_u^\top v_c` for the directions of each node of one sequence, per module.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions whose logits decide the next token.
        cotangents: ``(C_n, V)`` floating for each node.
        weights: One number for each node.
        last: How many of each node's last directions to sum over the nodes, with these weights.
        memory: The most bytes to take; None for half of what is free.
        ends: Where to cut the sequence; None for :func:`segment_ends`.
        roots: Also measure with each parameter's gradient scaled by these, which makes another metric of it
            (:class:`~odp_callbacks.engine.gradients.preconditioner.Preconditioner`).

    Returns:
        The matrices of each node, and the sums.
    """
    # Scaled to one, and back in the Gram matrix, so that half precision does not lose small directions.
    scales = [v.abs().amax(dim=-1).double().cpu() if v.numel() else v.new_zeros(len(v)).double() for v in cotangents]
    # A direction of exact zeros (a teacher that says nothing) needs no backward. NaN is not zero.
    heard = [(scale != 0).nonzero().squeeze(1) for scale in scales]
    if ends is None:
        time_budget = OVERHEAD.get(next(model.parameters()).device.type, ELSEWHERE)
        counts = [len(h) for h in heard]
        ends = segment_ends(positions, counts, time_budget) if backend_of(model) != "generate" else [max(positions) + 1]
    grams: list[Tensor] = [torch.empty(0)] * len(cotangents)
    preconditioned: list[Tensor] = [] if roots is None else [torch.empty(0)] * len(cotangents)
    sums: Tensor | None = None
    with _graph(model, input_ids, positions, ends) as graph:
        parameters = graph.parameters
        modules = lora_modules(list(parameters))
        size = sum(p.numel() for p in parameters.values())
        for (here, logits), end in zip(graph.segments, graph.ends, strict=True):
            units = [(place, cotangents[n][c], scales[n][c]) for place, n in enumerate(here) for c in heard[n]]
            most = max_directions(model, end, logits.numel(), memory)
            rows = _segment_rows(logits, list(parameters.values()), units, most)
            for place, n in enumerate(here):
                count, where = len(cotangents[n]), heard[n]
                grams[n] = _scattered(rows[place], parameters, modules, where, scales[n])
                if roots is not None:
                    scaled = [row * roots[name].flatten() for name, row in zip(parameters, rows[place], strict=True)]
                    preconditioned[n] = _scattered(scaled, parameters, modules, where, scales[n])
                if weights is not None and last:
                    factor = scales[n][where] * weights[n]
                    share = _sum_last(rows[place], where, factor, count, last, size)
                    sums = share if sums is None else sums + share
    return NodeGrams(grams, sums, preconditioned)


def _segment_rows(
    logits: Tensor, parameters: list[Tensor], units: Sequence[tuple[int, Tensor, Tensor]], most: int
) -> list[list[Tensor]]:
    """Pull the directions of a segment's nodes back, at most ``most`` together, whichever node they are of.

    Args:
        logits: ``(N, V)``, with their graph.
        parameters: What they are differentiated by.
        units: Each direction's node, the direction ``(V,)``, and what to divide it by; node by node.
        most: Directions at a time.

    Returns:
        For each node and parameter, ``(C_n, size)``; where the parameter was not used, zeros.
    """
    parts: list[list[Tensor]] = [[parameter.new_zeros(0, parameter.numel())] for parameter in parameters]
    for first in range(0, len(units), most):
        chunk = units[first : first + most]
        v = logits.new_zeros(len(chunk), *logits.shape)
        for row, (node, direction, scale) in enumerate(chunk):
            v[row, node] = (direction.double().cpu() / scale).to(logits)
        pulled = _backward(logits, parameters, v)
        for part, gradient, parameter in zip(parts, pulled, parameters, strict=True):
            part.append(parameter.new_zeros(len(chunk), parameter.numel()) if gradient is None else gradient.flatten(1))
    counts = [sum(node == n for node, _, _ in units) for n in range(len(logits))]
    return [list(of_node) for of_node in zip(*(torch.cat(part).split(counts) for part in parts), strict=True)]


def _backward(logits: Tensor, parameters: list[Tensor], v: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients ``(C, *shape)`` of ``logits`` for directions ``v`` ``(C, N, V)``, all at once where layers can."""
    try:
        return torch.autograd.grad(logits, parameters, v, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # A layer of somebody's own (for quantised weights, say) whose backward takes no batch of directions.
        rows = [torch.autograd.grad(logits, parameters, one, retain_graph=True, allow_unused=True) for one in v]
        return tuple(None if part[0] is None else torch.stack(part) for part in zip(*rows, strict=True))


def max_directions(model: nn.Module, tokens: int, logits: int, memory: float | None = None) -> int:
    """How many directions may go back together over ``tokens`` tokens and ``logits`` logits."""
    holder: Any = model
    config = holder.config.get_text_config()
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = getattr(config, "num_attention_heads", 1)
    parameter = next(model.parameters())
    # A layer's widest activations and its attention, and as much again for what follows them.
    numbers = 2 * tokens * (4 * width + 6 * config.hidden_size + 3 * heads * tokens) + 2 * logits
    fits = free_bytes(parameter.device, memory) // (numbers * max(4, parameter.element_size()))
    return max(1, min(int(fits), ROWS.get(parameter.device.type, 2**16) // tokens))


def summed_vjps(model: nn.Module, input_ids: Tensor, positions: Sequence[int], cotangents: Tensor) -> Tensor:
    r"""Sum over the nodes of one sequence of :math:`J_u^\top v_u`, for several choices of ``v``.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions.
        cotangents: ``(D, N, V)``.

    Returns:
        ``(D, P)`` float32.
    """
    with _graph(model, input_ids, positions, [max(positions) + 1]) as graph:
        ((_, logits),) = graph.segments
        cotangents = cotangents.double()
        scale = cotangents.abs().amax(dim=(1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
        unit = (cotangents / scale[:, None, None]).to(logits)
        leaves = list(graph.parameters.values())
        pulled = _backward(logits, leaves, unit)
    return flatten(pulled, graph.parameters).float() * scale[:, None].to(logits.device).float()


def _sum_last(rows: Sequence[Tensor], heard: Tensor, factor: Tensor, count: int, last: int, size: int) -> Tensor:
    """``(last, size)``, the last of a node's ``count`` directions, scaled; those that were not heard are zero."""
    device = rows[0].device
    wanted = (heard >= count - last).nonzero().squeeze(1)
    found = torch.zeros(last, size, device=device, dtype=torch.float32)
    if not len(wanted):
        return found
    flat = torch.cat([row[wanted.to(device)].float() for row in rows], dim=1)
    found[(heard[wanted] - (count - last)).to(device)] = flat * factor[wanted].to(device)[:, None].float()
    return found


def lora_modules(names: Sequence[str]) -> list[str]:
    """Module of each LoRA parameter, in order and without repetition.

    Examples:
        >>> lora_modules(["layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_B.default.weight"])
        ['layers.0.q_proj']
    """
    return list(dict.fromkeys(_module(name) for name in names))


def _module(name: str) -> str:
    return name.split(".lora_")[0].removeprefix("base_model.model.")


def _scattered(
    rows: Sequence[Tensor], names: Iterable[str], modules: list[str], heard: Tensor, scales: Tensor
) -> Tensor:
    """``(M, C, C)`` of all ``C`` directions, from rows of the ``heard`` ones, which were divided by ``scales``."""
    gram = torch.zeros(len(modules), len(scales), len(scales), dtype=torch.float64)
    if len(heard):
        factor = scales[heard]
        gram[:, heard[:, None], heard] = _gram(rows, list(names), modules) * (factor[:, None] * factor)
    return gram


def _gram(rows: Sequence[Tensor], names: Sequence[str], modules: list[str]) -> Tensor:
    """``(M, C, C)`` from each parameter's gradients ``(C, size)``."""
    gram = torch.zeros(len(modules), len(rows[0]), len(rows[0]), dtype=torch.float64)
    index = {module: m for m, module in enumerate(modules)}
    for name, row in zip(names, rows, strict=True):
        wide = row.double()
        gram[index[_module(name)]] += (wide @ wide.mT).cpu()
    return gram
