r"""Gram matrices of a rollout's nodes by random projection, in forward mode.

Where every token of a long response is a node, there are more directions to pull back than one would care to. A
tangent :math:`w` of random signs on the LoRA parameters goes forward once for all nodes; a node's direction :math:`v`
then has :math:`\langle v, J_u w \rangle = \langle J_u^\top v, w \rangle`, one coordinate of a sketch of its gradient.
With :math:`K` tangents the sketches' inner products are unbiased, and a cosine :math:`c` has a standard error of about
:math:`(1 - c^2) / \sqrt{K}`. Modules are not told apart.
"""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.gradients.vjp import max_directions
from odp_callbacks.engine.sampling.prefix_cache import vocabulary_size
from odp_callbacks.functional.gradients import logits_at, lora_parameters

FORWARD = 1.6
"""What a tangent costs, in directions pulled back over as many tokens; measured by ``benchmarks/projection.py``."""
ALL_MODULES = "all LoRA parameters"
"""The one module of a report whose gradients were projected."""


def projected_gram_matrices(
    model: nn.Module,
    input_ids: Tensor,
    positions: Sequence[int],
    cotangents: Sequence[Tensor],
    projections: int,
    generator: torch.Generator,
    memory: float | None = None,
    roots: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    r"""Unbiased estimates of the Gram matrices of :math:`J_u^\top v_c`, for the directions of each node.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions whose logits decide the next token.
        cotangents: ``(C_n, V)`` floating for each node.
        projections: How many tangents, ``K``.
        generator: Draws them; on the CPU.
        memory: The most bytes to take; None for half of what is free.
        roots: Scale each parameter's gradient by these, as :func:`~odp_callbacks.engine.gradients.vjp.node_gram_matrices` does.

    Returns:
        ``(1, C_n, C_n)`` float64 on the CPU, one for each node.
    """
    device = next(model.parameters()).device
    parameters = {name: p.detach() for name, p in lora_parameters(model).items()}
    at = torch.tensor(list(positions), device=device)
    ids = input_ids.to(device)[None, : max(positions) + 1]

    def logits(values: dict[str, Tensor]) -> Tensor:
        return logits_at(model, ids, at, parameters=values)[0]  # (N, V)

    def tangent(direction: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.jvp(logits, (parameters,), (direction,))[1]
        return found

    sketches: list[list[Tensor]] = [[] for _ in cotangents]
    most = max_directions(model, ids.shape[1], len(positions) * cotangents[0].shape[-1], memory)
    with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for first in range(0, projections, most):
            count = min(most, projections - first)
            signs = {
                name: torch.randint(2, (count, *p.shape), generator=generator).to(p) * 2 - 1
                for name, p in parameters.items()
            }
            if roots is not None:  # a scaled gradient's product with signs is the gradient's with scaled signs
                signs = {name: sign * roots[name].to(sign) for name, sign in signs.items()}
            pushed = torch.func.vmap(tangent)(signs)  # (k, N, V)
            for n, v in enumerate(cotangents):
                sketches[n].append(v.to(device).double() @ pushed[:, n].double().mT)  # (C, k)
    grams = []
    for rows in sketches:
        sketch = torch.cat(rows, dim=1)
        grams.append((sketch @ sketch.mT)[None].cpu() / projections)
    return grams


_known: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def supports_projection(model: nn.Module) -> bool:
    """Whether every layer of ``model`` can go forward with tangents (some for quantised weights cannot); tried once.

    Args:
        model: In evaluation mode.
    """
    # peft's LoRA on plain parameters registers parametrizations while it goes forward, which must not fail half way.
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        return False
    if model not in _known:
        try:
            projected_gram_matrices(
                model,
                torch.zeros(2, dtype=torch.long),
                [1],
                [torch.ones(1, vocabulary_size(model))],
                1,
                torch.Generator(),
            )
        except torch.OutOfMemoryError:
            raise  # says nothing about the model
        except (RuntimeError, NotImplementedError, ValueError):
            _known[model] = False
        else:
            _known[model] = True
    return _known[model]


def projection_is_cheaper(
    projections: int | None,
    lengths: Sequence[int],
    positions: Sequence[Sequence[int]],
    directions: Sequence[Sequence[int]],
) -> bool:
    """Whether projecting is cheaper than pulling back, over the sequences of a probe.

    Args:
        projections: How many tangents; None for never.
        lengths: Of each sequence, up to its last node.
        positions: Of each sequence's nodes.
        directions: How many each node has.

    Examples:
        >>> projection_is_cheaper(256, [550], [range(50, 550)], [[7] * 500])
        True
        >>> projection_is_cheaper(256, [550], [[60, 100, 300, 549]], [[7] * 4])
        False
    """
    if projections is None:
        return False
    exact = sum(p * c for at, count in zip(positions, directions, strict=True) for p, c in zip(at, count, strict=True))
    return FORWARD * projections * sum(lengths) < exact
