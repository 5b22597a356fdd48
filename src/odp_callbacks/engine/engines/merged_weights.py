"""The weights that a student's LoRA layers act with, without merging anything in place."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def merged_weights(student: nn.Module, *, every_weight: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Compute, one after the other, the weights of the layers with LoRA as the adapter makes them.

    peft merges a copy of each layer. Merging the student itself and taking the adapter out again would round its base
    twice.

    Args:
        student: A model with LoRA.
        every_weight: Whether to give all other weights of the model, too; a model without LoRA gives them anyway.

    Yields:
        Names as in the model without LoRA, and weights.

    Raises:
        ValueError: If the base is quantised.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> student = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
        >>> [name for name, _ in merged_weights(student)]
        ['0.weight']
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: layer for name, layer in student.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        if not layer.get_base_layer().weight.is_floating_point():
            raise ValueError(
                "`engine` cannot take over a student with a quantised base from its trainer, because merged weights "
                "would be rounded anew; use a vLLM server that loads adapters."
            )
        with torch.no_grad():
            merged = copy.deepcopy(layer)
            if not layer.disable_adapters:
                merged.merge(adapter_names=layer.active_adapters)
        yield name_in_base(f"{name}.weight"), merged.get_base_layer().weight.detach()
    if every_weight or not layers:
        merged_names = {name_in_base(f"{name}.weight") for name in layers}
        inner = tuple(f"{name}." for name in layers)
        for name, parameter in student.named_parameters():
            base_name = name_in_base(name)
            is_adapter = name.startswith(inner) and ".base_layer." not in name
            if not is_adapter and base_name not in merged_names and "original_module" not in name:
                yield base_name, parameter.detach()


def name_in_base(name: str) -> str:
    """The name of a weight in the model without LoRA.

    Examples:
        >>> name_in_base("base_model.model.model.layers.0.mlp.up_proj.base_layer.bias")
        'model.layers.0.mlp.up_proj.bias'
    """
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace("modules_to_save.default.", "")
