"""An engine from a configuration file: the import path of a class with its arguments."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def engine_of_class_path(value: Mapping[str, Any]) -> object:
    """Make what a configuration names.

    Args:
        value: ``class_path``, the import path of a class, and ``init_args``, its arguments by name.

    Raises:
        ValueError: If there is no such class, or it refuses the arguments.

    Examples:
        >>> path = "odp_callbacks.engine.engines.VllmServer"
        >>> engine_of_class_path({"class_path": path, "init_args": {"url": "http://localhost:8000"}})
        VllmServer('http://localhost:8000')
    """
    path, arguments = value.get("class_path"), value.get("init_args") or {}
    try:
        module_name, _, name = str(path).rpartition(".")
        return getattr(import_module(module_name), name)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"`engine` cannot be made of the class {path!r} with {dict(arguments)}: {error}") from error
