"""Teachers from a configuration file: the import path of a class with its arguments, as LightningCLI writes them."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from odp_callbacks.engine.teachers.kinds import Teacher

CLASS_PATH, ARGUMENTS = "class_path", "init_args"


def is_class_path(value: object) -> bool:
    """Whether a value names a class, as in ``{"class_path": "package.Teacher", "init_args": {...}}``."""
    return isinstance(value, Mapping) and CLASS_PATH in value


def teacher_of_class_path(value: Mapping[str, Any]) -> Teacher:
    """Make the teacher that a configuration names.

    Args:
        value: ``class_path``, the import path of a class of teachers, and ``init_args``, its arguments by name.

    Raises:
        ValueError: If the class cannot be imported or is none of teachers, or refuses the arguments.

    Examples:
        >>> teacher = teacher_of_class_path({"class_path": "odp_callbacks.EMATeacher", "init_args": {"decay": 0.99}})
        >>> teacher.decay
        0.99
    """
    if unknown := sorted(value.keys() - {CLASS_PATH, ARGUMENTS}):
        raise ValueError(
            f"`teachers` has a {CLASS_PATH!r} beside {unknown[0]!r}; the arguments of the class belong into "
            f"{ARGUMENTS!r}."
        )
    path = value[CLASS_PATH]
    kind = _imported(path)
    if not (isinstance(kind, type) and issubclass(kind, Teacher)):
        raise ValueError(
            f"`teachers` needs classes of teachers, such as 'odp_callbacks.ModelTeacher', but {path!r} is none."
        )
    try:
        return kind(**(value.get(ARGUMENTS) or {}))
    except TypeError as error:
        raise ValueError(f"`teachers` cannot make {path!r} from its {ARGUMENTS!r}: {error}.") from error


def _imported(path: object) -> object:
    """What an import path names."""
    if not isinstance(path, str) or "." not in path:
        raise ValueError(f"`teachers` needs import paths such as 'odp_callbacks.ModelTeacher', but {path!r} was given.")
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`teachers` names the class {path!r}, which cannot be imported: {error}.") from error
