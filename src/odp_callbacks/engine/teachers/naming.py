"""From what users give as ``teachers`` to teachers by name."""

from collections.abc import Mapping, Sequence

from torch import nn

from odp_callbacks.engine.engines.completions_client import is_address
from odp_callbacks.engine.teachers.class_paths import is_class_path, teacher_of_class_path
from odp_callbacks.engine.teachers.demonstration_contexts import named_context
from odp_callbacks.engine.teachers.kinds import AdapterTeacher, BaseTeacher, EMATeacher, ModelTeacher, Teacher
from odp_callbacks.engine.teachers.served import ServedTeacher
from odp_callbacks.text import is_visible

MAX_NAME_LENGTH = 100
"""Characters of a teacher's name, at most."""
NAMES = {BaseTeacher: "base", ModelTeacher: "model", ServedTeacher: "served", EMATeacher: "ema", Teacher: "self"}
"""Names of teachers that are given without one."""


def as_teachers(teachers: object) -> dict[str, Teacher]:
    """Name the teachers.

    Args:
        teachers: A mapping from name to teacher, a list of teachers, or one teacher. A plain model stands for
            :class:`~odp_callbacks.engine.teachers.ModelTeacher`, the address of a server for
            :class:`~odp_callbacks.engine.teachers.ServedTeacher`, ``"base"`` for
            :class:`~odp_callbacks.engine.teachers.BaseTeacher`, and a template, a function or the name of a context
            such as ``"self-1c"`` (:mod:`~odp_callbacks.engine.teachers.demonstration_contexts`) for the student with
            that context. ``{"class_path": "odp_callbacks.EMATeacher", "init_args": {"decay": 0.99}}`` makes a teacher
            of any class, as LightningCLI does.

    Returns:
        The teachers by name.

    Raises:
        ValueError: If there are no teachers, a name repeats or cannot be a part of a metric's name, or a type is
            unknown.

    Examples:
        >>> teachers = as_teachers({"base": "base", "answer": "The answer is {answer}. {prompt}"})
        >>> [type(teacher).__name__ for teacher in teachers.values()]
        ['BaseTeacher', 'Teacher']
    """
    if isinstance(teachers, Mapping) and not is_class_path(teachers):
        named = {str(name): _as_teacher(value) for name, value in teachers.items()}
    else:
        values = list(teachers) if isinstance(teachers, Sequence) and not isinstance(teachers, str) else [teachers]
        unnamed = [_as_teacher(value) for value in values]
        named = {_default_name(teacher): teacher for teacher in unnamed}
        if len(named) < len(unnamed):
            raise ValueError("`teachers` of the same kind need names; give a dict such as {'answer': Teacher(...)}.")
    if not named:
        raise ValueError("`teachers` is empty; give at least one, such as {'base': BaseTeacher()}.")
    for name in named:
        if not name.strip() or "/" in name or not is_visible(name) or len(name) > MAX_NAME_LENGTH:
            raise ValueError(
                "a teacher's name becomes a part of metric names: it must have no '/', only characters that can be "
                f"seen, and at most {MAX_NAME_LENGTH} of them, but `teachers` got {name[: MAX_NAME_LENGTH + 1]!r}."
            )
    return named


def _as_teacher(value: object) -> Teacher:
    if isinstance(value, Teacher):
        return value
    if isinstance(value, nn.Module):
        return ModelTeacher(value)
    if isinstance(value, Mapping) and is_class_path(value):
        return teacher_of_class_path(value)
    if value == "base":
        return BaseTeacher()
    if is_address(value):
        return ServedTeacher(value)
    if isinstance(value, str) and (context := named_context(value)) is not None:
        return Teacher(context)
    if isinstance(value, str) and "{" not in value:
        raise ValueError(
            f"`teachers` knows 'base' and templates with a {{column}}, and contexts of demonstrations such as "
            f"'self-1c' or 'self-sum-1c1w', but {value!r} was given."
        )
    if isinstance(value, str) or callable(value):
        return Teacher(value)
    raise ValueError(f"`teachers` takes teachers, models, templates or functions, but {value!r} was given.")


def _default_name(teacher: Teacher) -> str:
    """The adapter's name, the name of the kind, or that of a class of the user's."""
    return teacher.adapter if isinstance(teacher, AdapterTeacher) else NAMES.get(type(teacher), type(teacher).__name__)
