"""Attributes that some modules of a model have, asked for without the error of those that have not."""

from typing import Any

from torch import nn


def module_attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module; None without it.

    ``getattr`` with a default does the same. For a name that a module does not have, it takes four times longer: the
    error of ``nn.Module`` is made and thrown away, for each of the thousand modules of a model.

    Args:
        module: A module.
        name: The attribute's name.

    Examples:
        >>> layer = nn.Linear(2, 3)
        >>> module_attribute(layer, "out_features"), module_attribute(layer, "head_dim")
        (3, None)
    """
    known = name in module.__dict__ or name in module._modules or name in module._parameters or name in module._buffers
    return getattr(module, name) if known or hasattr(type(module), name) else None
