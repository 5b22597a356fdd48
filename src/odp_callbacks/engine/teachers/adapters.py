"""Switching a student to another of its adapters, or to none, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import nn


@contextmanager
def active_adapter(student: nn.Module, adapter: str | None) -> Iterator[None]:
    """Activate one adapter, or disable all of them, and restore the previous state afterwards.

    peft's own methods also change which parameters require gradients, and some of them fail on layers that do not
    have the adapter. The forward of a layer reads only the two attributes that are set here.

    Args:
        student: A model with peft's layers.
        adapter: The adapter's name; None to disable all adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [
        module for module in student.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    previous_states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            # A wrapper without this adapter runs its original module.
            active = layer._active_adapter if adapter is None else [adapter] if adapter in _adapters_of(layer) else []
            _set_state(layer, active, adapter is None)
        yield
    finally:
        for state in previous_states:
            _set_state(*state)


def _set_state(layer: Any, adapters: str | list[str], disabled: bool) -> None:
    """Set the two attributes; ``nn.Module`` takes longer for it, since it looks for parameters of that name first."""
    object.__setattr__(layer, "_active_adapter", adapters)
    object.__setattr__(layer, "_disable_adapters", disabled)


def _adapters_of(layer: Any) -> set[str]:
    """Names of the adapters that a layer of peft holds."""
    containers = (attrgetter(name)(layer) for name in layer.adapter_layer_names)
    return {adapter for container in containers for adapter in container}
