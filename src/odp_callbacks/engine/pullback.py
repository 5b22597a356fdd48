"""Pulling directions on a rollout's nodes back to the LoRA parameters, and their Gram matrices.

One forward serves all nodes of a rollout; the directions of a node go back together, as one batched
vector-Jacobian product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.functional.gradients import flatten, logits_at, lora_parameters


def gram_matrices(
    model: nn.Module,
    input_ids: Tensor,
    positions: Sequence[int],
    cotangents: Sequence[Tensor],
    most_directions: int = 16,
) -> list[Tensor]:
    r"""Gram matrices of :math:`J_u^\top v_c` for the directions of each node of one sequence, per module.

    Args:
        model: Student with LoRA, in evaluation mode.
        input_ids: ``(T,)`` int64, without padding.
        positions: ``N`` positions whose logits decide the next token.
        cotangents: ``(C_n, V)`` floating for each node.
        most_directions: The most directions to send back at a time: memory grows with it.

    Returns:
        ``(M, C_n, C_n)`` float64 on the CPU for each node, one matrix for each of the ``M`` modules of
        :func:`lora_modules`; their sum over ``M`` is the Gram matrix on all LoRA parameters.
    """
    device = next(model.parameters()).device
    parameters = {name: p.detach().requires_grad_() for name, p in lora_parameters(model).items()}
    modules = lora_modules(list(parameters))
    # Scaled to one, and back in the Gram matrix, so that half precision does not lose small directions.
    scales = [v.abs().amax(dim=-1).double().cpu() if v.numel() else v.new_zeros(len(v)).double() for v in cotangents]
    grams = []
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
    return grams


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
