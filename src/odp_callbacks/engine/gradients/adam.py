"""The preconditioner of Adam's next step, from the second moments that the optimizer holds."""

from collections.abc import Mapping, Sequence
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

_Owner = tuple[Optimizer, dict[str, Any]]
"""An optimizer, and the parameter group that a parameter is in."""


def adam_preconditioner(optimizers: Optimizer | Sequence[Optimizer], student: nn.Module) -> Preconditioner | None:
    r"""The preconditioner with which Adam's next step is a step along the preconditioned gradient.

    Momentum and weight decay aside, Adam moves a parameter by :math:`\eta\, d / (\sqrt{\hat v} + \epsilon)`. The
    weights are therefore :math:`\eta_i / (\eta (\sqrt{\hat v_i} + \epsilon))`. Here :math:`\hat v` are the
    bias-corrected second moments that the optimizer holds now (their maximum so far with ``amsgrad``), and
    :math:`\eta_i / \eta` is each group's learning rate relative to the largest. A number that no gradient has reached
    yet has no second moment. What the next step does to it is unknown, and its weight is 0.

    Args:
        optimizers: One optimizer or several that together train the student: Adam or AdamW, of torch in any of its
            implementations, or of bitsandbytes.
        student: The student.

    Returns:
        The preconditioner, or None before the first step, when there are no second moments.

    Raises:
        ValueError: If a LoRA parameter is trained by another kind of optimizer or by none, or is stepped on twice.

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
    all_optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    student = uncompiled(student)
    owners = {
        id(parameter): (optimizer, group)
        for optimizer in all_optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = lora_parameters(student)
    _check_owners(parameters, owners, len(all_optimizers))
    _check_stepped_once(student, parameters, owners)
    learning_rates = {name: float(owners[id(parameter)][1]["lr"]) for name, parameter in parameters.items()}
    largest_rate = max(learning_rates.values())
    weights = {}
    for name, parameter in parameters.items():
        optimizer, group = owners[id(parameter)]
        relative_rate = learning_rates[name] / largest_rate if largest_rate > 0 else 1.0
        weights[name] = relative_rate * _weights(optimizer.state.get(parameter, {}), group, parameter)
    if not any(bool(weight.any()) for weight in weights.values()):
        return None
    return Preconditioner("adam", weights)


def _check_owners(parameters: Mapping[str, nn.Parameter], owners: Mapping[int, _Owner], optimizer_count: int) -> None:
    """Raise ``ValueError`` unless an Adam optimizer trains every one of ``parameters``."""
    for name, parameter in parameters.items():
        if id(parameter) not in owners:
            raise ValueError(
                f"the optimizer's geometry was asked for, but {name} is a parameter of none of the {optimizer_count} "
                "optimizers; leave `optimizer_geometry` off, or train all LoRA parameters of the student."
            )
        optimizer, _ = owners[id(parameter)]
        if not _is_adam(optimizer):
            raise ValueError(
                f"the optimizer's geometry is known for Adam and AdamW, but {name} is trained by "
                f"{type(optimizer).__name__}; leave `optimizer_geometry` off."
            )


def _check_stepped_once(
    student: nn.Module, parameters: Mapping[str, nn.Parameter], owners: Mapping[int, _Owner]
) -> None:
    """Raise ``ValueError`` if two trained parameters of the student share the memory of one of ``parameters``."""
    addresses = [parameter.data_ptr() for parameter in student.parameters() if id(parameter) in owners]
    repeated = [name for name, parameter in parameters.items() if addresses.count(parameter.data_ptr()) > 1]
    if repeated:
        raise ValueError(
            f"the optimizer's geometry was asked for, but the optimizer steps on {repeated[0]} twice "
            "(`ensure_weight_tying` on tied embeddings), and no preconditioner describes that; leave "
            "`optimizer_geometry` off."
        )


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
    bias_correction = 1 - float(group["betas"][1]) ** float(state["step"])
    weights = 1 / ((moment / bias_correction).sqrt() + float(group["eps"]))
    return torch.where(moment > 0, weights, 0)


def _second_moment(state: dict[str, Any]) -> Tensor | None:
    """The second moment in the state of torch's optimizers, or of bitsandbytes' in 32 or 8 bits; None if absent."""
    moment: Tensor | None = state.get("max_exp_avg_sq", state.get("exp_avg_sq", state.get("state2")))
    if moment is None or moment.dtype != torch.uint8:
        return moment
    from bitsandbytes.functional import dequantize_blockwise

    dequantized: Tensor = dequantize_blockwise(
        moment, absmax=state["absmax2"], code=state["qmap2"], blocksize=EIGHT_BIT_BLOCK
    )
    return dequantized
