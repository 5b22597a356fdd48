"""Pulling directions on a rollout's nodes back to the LoRA parameters, and their Gram matrices.

One forward serves all nodes of a rollout; the directions of a node go back together, as one batched
vector-Jacobian product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.functional.gradients import flatten, logits_at, lora_parameters


def pull_back(
    model: nn.Module,
    input_ids: Tensor,
    positions: Sequence[int],
    cotangents: Sequence[Tensor],
    most_directions: int = 16,
    weights: Sequence[float] | None = None,
    last: int = 0,
) -> tuple[list[Tensor], Tensor | None]:
    r"""Gram matrices of :math:`J_u^\top v_c` for the directions of each node of one sequence, per module.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions whose logits decide the next token.
        cotangents: ``(C_n, V)`` floating for each node.
        most_directions: The most directions to send back at a time: memory grows with it.
        weights: One number for each node.
        last: How many of each node's last directions to sum over the nodes, with these weights.

    Returns:
        Gram matrices ``(M, C_n, C_n)`` float64 on the CPU, one for each node, one matrix for each of the ``M``
        modules of :func:`lora_modules`; their sum over ``M`` is the Gram matrix on all LoRA parameters. And the sums
        ``(last, P)`` float32, or None.
    """
    device = next(model.parameters()).device
    parameters = {name: p.detach().requires_grad_() for name, p in lora_parameters(model).items()}
    modules = lora_modules(list(parameters))
    # Scaled to one, and back in the Gram matrix, so that half precision does not lose small directions.
    scales = [v.abs().amax(dim=-1).double().cpu() if v.numel() else v.new_zeros(len(v)).double() for v in cotangents]
    grams = []
    sums: Tensor | None = None
    # Of the kernels for scaled dot product attention only the plain one can be batched over directions.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        at = torch.tensor(list(positions), device=device)
        logits = logits_at(model, input_ids.to(device)[None], at, parameters=parameters)[0]  # (N, V)
        for n, (v, scale) in enumerate(zip(cotangents, scales, strict=True)):
            # A direction of exact zeros (a teacher that says nothing) needs no backward. NaN is not zero.
            heard = (scale != 0).nonzero().squeeze(1)
            unit = (v.double().cpu()[heard] / scale[heard, None]).to(logits)
            pulled = [
                torch.autograd.grad(
                    logits[n],
                    list(parameters.values()),
                    chunk,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
                for chunk in unit.split(most_directions)
                if len(chunk)
            ]
            gram = torch.zeros(len(modules), len(v), len(v), dtype=torch.float64)
            gram[:, heard[:, None], heard] = _gram(pulled, parameters, modules) * scale[heard, None] * scale[heard]
            grams.append(gram)
            if weights is not None and last:
                factor = torch.where(scale != 0, scale, 0)[heard] * weights[n]
                share = _sum_last(pulled, parameters, heard, factor, len(v), last)
                sums = share if sums is None else sums + share
    return grams, sums


def pull_sums(model: nn.Module, input_ids: Tensor, positions: Sequence[int], cotangents: Tensor) -> Tensor:
    r"""Sum over the nodes of one sequence of :math:`J_u^\top v_u`, for several choices of ``v``.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions.
        cotangents: ``(D, N, V)``.

    Returns:
        ``(D, P)`` float32.
    """
    device = next(model.parameters()).device
    parameters = {name: p.detach().requires_grad_() for name, p in lora_parameters(model).items()}
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        at = torch.tensor(list(positions), device=device)
        logits = logits_at(model, input_ids.to(device)[None], at, parameters=parameters)[0]  # (N, V)
        scale = cotangents.abs().amax(dim=(1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
        unit = (cotangents / scale[:, None, None]).to(logits)
        pulled = torch.autograd.grad(logits, list(parameters.values()), unit, allow_unused=True, is_grads_batched=True)
    return flatten(pulled, parameters).float() * scale[:, None].to(logits.device).float()


def _sum_last(
    pulled: Sequence[tuple[Tensor | None, ...]],
    parameters: dict[str, Tensor],
    heard: Tensor,
    factor: Tensor,
    count: int,
    last: int,
) -> Tensor:
    """``(last, P)``, the last of a node's ``count`` directions, scaled; those that were not heard are zero."""
    size = sum(p.numel() for p in parameters.values())
    device = next(iter(parameters.values())).device
    found = torch.zeros(last, size, device=device, dtype=torch.float32)
    wanted = (heard >= count - last).nonzero().squeeze(1)
    if len(wanted):
        rows = torch.cat([flatten(chunk, parameters).float() for chunk in pulled])
        at = (heard[wanted] - (count - last)).to(device)
        found[at] = rows[wanted.to(device)] * factor[wanted].to(device)[:, None].float()
    return found


def lora_modules(names: Sequence[str]) -> list[str]:
    """Module of each LoRA parameter, in order and without repetition.

    Example:
        >>> lora_modules(["layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_B.default.weight"])
        ['layers.0.q_proj']
    """
    return list(dict.fromkeys(_module(name) for name in names))


def _module(name: str) -> str:
    return name.split(".lora_")[0].removeprefix("base_model.model.")


def _gram(pulled: Sequence[tuple[Tensor | None, ...]], parameters: dict[str, Tensor], modules: list[str]) -> Tensor:
    """``(M, C, C)`` from the chunks' gradients, each parameter's ``(chunk, *shape)``."""
    size = sum(len(next(g for g in chunk if g is not None)) for chunk in pulled)
    gram = torch.zeros(len(modules), size, size, dtype=torch.float64)
    index = {module: m for m, module in enumerate(modules)}
    for i, (name, parameter) in enumerate(parameters.items()):
        parts = [flatten((chunk[i],), {name: parameter}) for chunk in pulled if chunk[i] is not None]
        if parts:
            rows = torch.cat(parts).double()  # (C, size of the parameter)
            gram[index[_module(name)]] += (rows @ rows.mT).cpu()
    return gram
