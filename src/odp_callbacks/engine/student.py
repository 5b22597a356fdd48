"""What a student must be: adapted by LoRA, in a way that makes the gradients of its policy those of its training."""

from operator import attrgetter
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from odp_callbacks.functional.gradients import lora_parameters

LORA = {"LORA", "ADALORA"}
"""Methods of peft whose parameters are measured."""
VARIANTS = ("Dora", "MiCA", "BdLora")
"""Variants of LoRA whose forward in evaluation mode is their policy, and depends on nothing but their input."""
RESIDUAL = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that move a part of the base's weights into the adapter."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where ``torch.compile(model)`` wrapped it."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def check_student(student: nn.Module) -> None:
    """Refuse what is not adapted by LoRA alone, or cannot be differentiated as it stands.

    Raises:
        ValueError: It says what was given, and what would work.
    """
    methods = sorted({_method(config) for config in _configs(student).values()} - LORA)
    if methods:
        raise ValueError(
            f"`student` must be adapted by LoRA, but its adapter's method is {', '.join(methods)}; "
            "wrap the base model with peft.get_peft_model(model, LoraConfig(...)) instead."
        )
    lora_parameters(student)  # refuses a student without any
    layers = [module for module in student.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "`student` has its LoRA weights merged into the base's, where nothing of them is left to differentiate; "
            "call `student.unmerge_adapter()` first."
        )
    if all(layer.disable_adapters for layer in layers):
        raise ValueError("`student` has its adapters switched off; call `student.enable_adapter_layers()` first.")
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in student.parameters()):
        raise ValueError(
            "`student` has weights of 4 bits that bitsandbytes packed for inference in a forward in evaluation mode, "
            "and no gradient passes them; load the model anew and leave it in training mode."
        )
    for layer in layers:
        for adapter, variant in getattr(layer, "lora_variant", {}).items():
            name = type(variant).__name__
            if adapter in layer.active_adapters and variant is not None and not name.startswith(VARIANTS):
                raise ValueError(
                    f"`student` uses peft's {name}, whose gradients in evaluation mode are not those of its training; "
                    "LoRA, rank-stabilised LoRA and DoRA work."
                )


def trained_beside(student: nn.Module) -> dict[str, int]:
    """Sizes of the parameters that train and are no LoRA parameters, by name: they are not measured.

    Full copies of modules (``modules_to_save``), token embeddings (``trainable_token_indices``), biases, and whatever
    of the base requires gradients.
    """
    measured = {p.data_ptr() for p in lora_parameters(student).values()}
    return {n: p.numel() for n, p in student.named_parameters() if p.requires_grad and p.data_ptr() not in measured}


def why_not_base(student: nn.Module) -> str | None:
    """Why the student with its adapters off is not the model that it was made from; None where it is."""
    for config in _configs(student).values():
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(RESIDUAL):
            return f"`init_lora_weights={init!r}` moved a part of its weights into the adapter"
        if getattr(config, "layer_replication", None):
            return "`layer_replication` repeated its layers"
    held = {id(p) for module in student.modules() for p in _adapter_parameters(module)}
    training = [name for name, p in student.named_parameters() if p.requires_grad and id(p) not in held]
    if training:
        return f"its own parameters train ({training[0].removeprefix('base_model.model.')}, …)"
    return None


def _configs(student: nn.Module) -> dict[str, Any]:
    """Configurations of the student's adapters, by name; empty where layers were put in without a peft model."""
    found: Any = getattr(student, "peft_config", None)
    return found if isinstance(found, dict) else {}


def _method(config: Any) -> str:
    method = getattr(config, "peft_type", None)
    return str(getattr(method, "value", method))


def _adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of all adapters that a layer of peft holds."""
    if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return []
    layer: Any = module
    held = []
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        container = attrgetter(name)(layer)
        if isinstance(container, nn.Module):  # also ModuleDict and ParameterDict
            held += list(container.parameters())
    return held
