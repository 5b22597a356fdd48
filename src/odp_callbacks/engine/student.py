"""Requirements on the student: it is adapted by LoRA so that the gradients of its policy are those of its training."""

from operator import attrgetter
from typing import Any

from torch import nn

from odp_callbacks.functional.gradients import lora_parameters

MEASURED_METHODS = {"LORA", "ADALORA"}
"""Methods of peft whose parameters are measured."""
MEASURED_VARIANTS = ("Dora", "MiCA", "BdLora")
"""Variants of LoRA whose forward in evaluation mode is their policy, and depends on nothing but their input."""
RESIDUAL_INITIALISATIONS = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that move a part of the base's weights into the adapter."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile(model)`` wrapped, or the model itself."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def check_student(student: nn.Module) -> None:
    """Check that a student is adapted by LoRA alone and can be differentiated in its current state.

    Args:
        student: The student.

    Raises:
        ValueError: If it is not; the message says why, and what would work.
    """
    from peft.tuners.lora import LoraLayer

    other_methods = sorted({_method(config) for config in _adapter_configs(student).values()} - MEASURED_METHODS)
    if other_methods:
        raise ValueError(
            f"`student` must be adapted by LoRA, but its adapter's method is {', '.join(other_methods)}; "
            "wrap the base model with peft.get_peft_model(model, LoraConfig(...)) instead."
        )
    lora_parameters(student)  # raises if there are none
    devices = sorted({str(parameter.device) for parameter in student.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"`student` lies on several devices ({', '.join(devices)}), and is measured on one; load it with "
            "`device_map={'': 0}`, if need be with 4-bit weights."
        )
    layers = [module for module in student.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "`student` has its LoRA weights merged into the base's, so they have no gradients; "
            "call `student.unmerge_adapter()` first."
        )
    if all(layer.disable_adapters for layer in layers):
        raise ValueError("`student` has its adapters switched off; call `student.enable_adapter_layers()` first.")
    quant_states = [getattr(parameter, "quant_state", None) for parameter in student.parameters()]
    if any(getattr(state, "packing_format_for_cpu", False) for state in quant_states):
        raise ValueError(
            "`student` has 4-bit weights that bitsandbytes packed for inference during a forward pass in evaluation "
            "mode, and gradients cannot pass through them; load the model again and leave it in training mode."
        )
    for layer in layers:
        _check_variants(layer)


def shares_adapters(student: nn.Module, model: nn.Module) -> bool:
    """Whether a model holds LoRA parameters of the student, the same tensors or views of their memory."""
    addresses = {parameter.data_ptr() for parameter in lora_parameters(student).values() if parameter.numel()}
    return any(parameter.numel() > 0 and parameter.data_ptr() in addresses for parameter in model.parameters())


def _check_variants(layer: Any) -> None:
    """Raise ``ValueError`` if an active adapter of the layer is a variant of LoRA that is not measured."""
    for adapter, variant in getattr(layer, "lora_variant", {}).items():
        variant_name = type(variant).__name__
        if adapter in layer.active_adapters and variant is not None and not variant_name.startswith(MEASURED_VARIANTS):
            raise ValueError(
                f"`student` uses peft's {variant_name}, whose gradients in evaluation mode are not those of its "
                "training; LoRA, rank-stabilised LoRA and DoRA work."
            )


def other_trained_parameters(student: nn.Module) -> dict[str, int]:
    """Parameters that the student trains in addition to its LoRA parameters; they are not measured.

    These are full copies of modules (``modules_to_save``), token embeddings (``trainable_token_indices``), biases, and
    parameters of the base that require gradients.

    Args:
        student: The student.

    Returns:
        The number of elements of each, by name.
    """
    measured = {parameter.data_ptr() for parameter in lora_parameters(student).values()}
    return {
        parameter_name: parameter.numel()
        for parameter_name, parameter in student.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in measured
    }


def difference_from_base(student: nn.Module) -> str | None:
    """Why the student with its adapters disabled differs from the model that it was made from.

    Args:
        student: The student.

    Returns:
        The reason as a clause, or None if there is no difference.
    """
    for config in _adapter_configs(student).values():
        initialisation = getattr(config, "init_lora_weights", True)
        if isinstance(initialisation, str) and initialisation.lower().startswith(RESIDUAL_INITIALISATIONS):
            return f"`init_lora_weights={initialisation!r}` moved a part of its weights into the adapter"
        if getattr(config, "layer_replication", None):
            return "`layer_replication` repeated its layers"
    of_adapters = {id(parameter) for module in student.modules() for parameter in _adapter_parameters(module)}
    trained = [
        parameter_name
        for parameter_name, parameter in student.named_parameters()
        if parameter.requires_grad and id(parameter) not in of_adapters
    ]
    if trained:
        return f"its own parameters train ({trained[0].removeprefix('base_model.model.')}, …)"
    return None


def _adapter_configs(student: nn.Module) -> dict[str, Any]:
    """Configurations of the student's adapters by name; empty if its layers were inserted without a peft model."""
    configs: Any = getattr(student, "peft_config", None)
    return configs if isinstance(configs, dict) else {}


def _method(config: Any) -> str:
    method = getattr(config, "peft_type", None)
    return str(getattr(method, "value", method))


def _adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of all adapters that a layer of peft holds; none for other modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return []
    layer: Any = module
    parameters = []
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        container = attrgetter(attribute)(layer)
        if isinstance(container, nn.Module):  # including ModuleDict and ParameterDict
            parameters += list(container.parameters())
    return parameters
