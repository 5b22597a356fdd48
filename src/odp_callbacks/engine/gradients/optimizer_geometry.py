"""The optimizer's own geometry: Adam's second moments as the metric on the LoRA parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.student import uncompiled
from odp_callbacks.functional.gradients import lora_parameters

ADAM = (torch.optim.Adam, torch.optim.AdamW)
EIGHT_BIT_BLOCK = 256
"""Numbers that share a scale in the states of bitsandbytes' optimizers."""


def adam_preconditioner(optimizers: Optimizer | Sequence[Optimizer], student: nn.Module) -> Preconditioner | None:
    r"""The metric in which a step of Adam is a step along the gradient.

    Momentum and weight decay aside, Adam moves a parameter by :math:`\eta\, d / (\sqrt{\hat v} + \epsilon)`. So the
    weights are :math:`\eta_i / (\eta (\sqrt{\hat v_i} + \epsilon))` with the bias-corrected second moments
    :math:`\hat v` that the optimizer holds now (their largest so far with ``amsgrad``), and each group's learning rate
    relative to the largest. A number that no gradient has reached yet has no second moment: what the next step does to
    it is unknown, and it does not count (weight 0).

    Args:
        optimizers: Adam or AdamW of torch in any of its implementations, or of bitsandbytes; or several, which
            together train the student.
        student: The student.

    Returns:
        The metric, or None before the first step, when there are no second moments at all.

    Raises:
        ValueError: If a LoRA parameter is trained by another optimizer or by none, or is two parameters in one.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        >>> model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn"]))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        >>> adam_preconditioner(optimizer, model) is None
        True
    """
    several = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    student = uncompiled(student)
    owners = {id(p): (o, group) for o in several for group in o.param_groups for p in group["params"]}
    parameters = lora_parameters(student)
    for name, p in parameters.items():
        if id(p) not in owners:
            raise ValueError(
                f"the optimizer's geometry was asked for, but {name} is a parameter of none of the {len(several)} "
                "optimizers; leave `optimizer_geometry` off, or train all LoRA parameters of the student."
            )
        if not _is_adam(owners[id(p)][0]):
            raise ValueError(
                f"the optimizer's geometry is known for Adam and AdamW, but {name} is trained by "
                f"{type(owners[id(p)][0]).__name__}; leave `optimizer_geometry` off."
            )
    places = [p.data_ptr() for p in student.parameters() if id(p) in owners]
    if twice := [name for name, p in parameters.items() if places.count(p.data_ptr()) > 1]:
        raise ValueError(
            f"the optimizer's geometry was asked for, but the optimizer steps on {twice[0]} twice "
            "(`ensure_weight_tying` on tied embeddings), and no metric describes that; leave `optimizer_geometry` off."
        )
    rates = {name: float(owners[id(p)][1]["lr"]) for name, p in parameters.items()}
    largest = max(rates.values())
    weights = {}
    for name, p in parameters.items():
        optimizer, group = owners[id(p)]
        share = rates[name] / largest if largest > 0 else 1.0
        weights[name] = share * _weights(optimizer.state.get(p, {}), group, p)
    if not any(bool(weight.any()) for weight in weights.values()):
        return None
    return Preconditioner("adam", weights)


def _is_adam(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    if isinstance(optimizer, ADAM):
        return True
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__.removeprefix("Paged").startswith("Adam")


def _weights(state: dict[str, Any], group: dict[str, Any], parameter: Tensor) -> Tensor:
    """``1 / (sqrt(v) + eps)`` in float64, of the parameter's shape; 0 where there is no second moment."""
    moment = _second_moment(state)
    if moment is None:
        return torch.zeros_like(parameter, dtype=torch.float64)
    moment = moment.detach().to(parameter.device, torch.float64).reshape(parameter.shape)
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    weights = 1 / ((moment / correction).sqrt() + float(group["eps"]))
    return torch.where(moment > 0, weights, 0)


def _second_moment(state: dict[str, Any]) -> Tensor | None:
    """As torch keeps it, or bitsandbytes, in 32 or 8 bits."""
    found: Tensor | None = state.get("max_exp_avg_sq", state.get("exp_avg_sq", state.get("state2")))
    if found is None or found.dtype != torch.uint8:
        return found
    from bitsandbytes.functional import dequantize_blockwise

    whole: Tensor = dequantize_blockwise(found, absmax=state["absmax2"], code=state["qmap2"], blocksize=EIGHT_BIT_BLOCK)
    return whole
