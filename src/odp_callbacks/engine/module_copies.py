"""A copy of a sharded model's modules with other parameters, without what spreads the model over processes."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from odp_callbacks.engine.sharded_parameters import fully_sharded_modules

DISTRIBUTED_PACKAGES = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.integrations.tensor_parallel")
"""Packages whose hooks gather and release shards."""
COMPOSABLE_STATE = "__composable_api"
"""How the attributes begin in which torch keeps what ``fully_shard`` needs."""
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where ``torch.compile`` and activation checkpointing keep the module that they wrap."""


def inner_module(module: nn.Module) -> nn.Module:
    """The module within the wrappers of ``torch.compile`` and activation checkpointing, or the module itself."""
    for attribute in WRAPPED:
        if isinstance(inner := module._modules.get(attribute), nn.Module):
            return inner_module(inner)
    return module


def plain_name(name: str) -> str:
    """A parameter's name without those wrappers.

    Examples:
        >>> plain_name("layers.0._checkpoint_wrapped_module.weight")
        'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def copy_modules(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> nn.Module:
    """Copy the modules of a model.

    The copy shares buffers, configurations and other objects with the model. It has no wrappers of ``torch.compile``
    and activation checkpointing, and no hooks of FSDP2, tensor parallelism and DeepSpeed.

    Args:
        model: The model.
        parameters: The copy's parameters, by the ``id`` of those that they replace; the others are shared.

    Raises:
        ValueError: If a module's ``forward`` was replaced by a function of which it is not known on what it acts.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
        >>> ones = nn.Parameter(torch.ones(1, 2))
        >>> copy = copy_modules(model, {id(model[0].weight): ones})
        >>> copy[0].weight is ones, copy[0].bias is model[0].bias, copy[0] is model[0]
        (True, True, False)
    """
    sharded = {id(module) for module in fully_sharded_modules(model)}
    modules = {id(inner): inner for inner in map(inner_module, model.modules())}
    copies: dict[int, nn.Module] = {}
    for address, module in modules.items():
        kind = _class_before_sharding(module) if address in sharded else type(module)
        copies[address] = kind.__new__(kind)
    for address, module in modules.items():
        _fill(copies[address], module, parameters, copies)
    return copies[id(inner_module(model))]


def _class_before_sharding(module: nn.Module) -> type[nn.Module]:
    """The class that ``fully_shard`` derived another one from, in place."""
    place: int = getattr(type(module), "_orig_cls_mro_index", 2)  # FSDP<class>, FSDPModule, class
    kind: type[nn.Module] = type(module).__mro__[place]
    return kind


def _fill(
    copy: nn.Module, module: nn.Module, parameters: Mapping[int, nn.Parameter], copies: Mapping[int, nn.Module]
) -> None:
    """Give a copy the attributes of its module."""
    forward = module.__dict__.get("forward")
    if forward is not None and not isinstance(forward, MethodType):
        raise ValueError(
            f"`student` is sharded, and {type(module).__name__}.forward was replaced by a function that may act on the "
            "shards; give a function that loads the student unsharded as `student_replica`."
        )
    attributes = {
        name: _kept_hooks(value) if name.endswith("_hooks") and isinstance(value, dict) else _copied(value, copies)
        for name, value in module.__dict__.items()
        if name not in ("_parameters", "_modules", "_buffers") and not name.startswith(COMPOSABLE_STATE)
    }
    copy.__dict__.update(attributes)
    copy.__dict__["_parameters"] = {
        name: parameter if parameter is None else parameters.get(id(parameter), parameter)
        for name, parameter in module._parameters.items()
    }
    copy.__dict__["_buffers"] = dict(module._buffers)
    copy.__dict__["_modules"] = {
        name: child if child is None else copies[id(inner_module(child))] for name, child in module._modules.items()
    }


def _kept_hooks(hooks: dict[Any, Any]) -> dict[Any, Any]:
    """The hooks that do not gather or release shards."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if not _is_of_sharding(hook))


def _is_of_sharding(hook: Callable[..., Any]) -> bool:
    function = hook.func if isinstance(hook, partial) else hook
    return str(getattr(function, "__module__", None)).startswith(DISTRIBUTED_PACKAGES)


def _copied(value: Any, copies: Mapping[int, nn.Module]) -> Any:
    """A module's attribute as its copy has it: containers are copied, and what refers to modules refers to copies."""
    if isinstance(value, nn.Module):
        return copies.get(id(inner_module(value)), value)
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) in (list, tuple, set):
        return type(value)(_copied(part, copies) for part in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(part, copies)) for key, part in value.items())
    return value
