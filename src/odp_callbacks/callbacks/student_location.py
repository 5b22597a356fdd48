"""Where the student is in a module that holds it."""

from collections.abc import Callable
from typing import Any, TypeAlias

from peft import PeftModel
from torch import nn

StudentLocator: TypeAlias = str | Callable[[Any], nn.Module]
"""A dotted path in a module, or a function that takes the module and returns the student."""


def locate_students(module: nn.Module, locator: StudentLocator | None) -> list[nn.Module]:
    """Return the student that ``locator`` names, or every peft model in the module if it is None.

    Args:
        module: The module that holds the student.
        locator: A dotted path, a function of the module, or None.

    Raises:
        ValueError: If the module has no submodule at the given path.
    """
    if locator is None:
        return [submodule for submodule in module.modules() if isinstance(submodule, PeftModel)]
    if not isinstance(locator, str):
        return [locator(module)]
    try:
        return [module.get_submodule(locator)]
    except AttributeError:
        raise ValueError(
            f"`student` is {locator!r}, but {type(module).__name__} has no such submodule; "
            f"it has {sorted(name for name, _ in module.named_children())}."
        ) from None
