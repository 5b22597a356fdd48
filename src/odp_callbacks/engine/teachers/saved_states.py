"""Gives teachers the states of a checkpoint that may have been saved with other teachers."""

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any, Protocol

from odp_callbacks.engine.teachers.kinds import Teacher


def restore_teachers(teachers: Mapping[str, Teacher], saved_states: Mapping[str, Any]) -> list[str]:
    """Give each teacher the state that was saved under its name, where one was saved and fits.

    Args:
        teachers: The teachers that there are now, by name.
        saved_states: What their :meth:`~odp_callbacks.engine.teachers.Teacher.state_dict` returned when it was saved.

    Returns:
        A sentence about each teacher whose state was dropped or is missing.
    """
    sentences = [
        f"the checkpoint has a state of the teacher {name!r}, but the teachers are {list(teachers)} now; dropped it."
        for name in saved_states
        if name not in teachers
    ]
    for name, teacher in teachers.items():
        has_state = bool(teacher.state_dict())
        saved_state = saved_states.get(name)
        if has_state and name not in saved_states:
            sentences.append(f"the checkpoint has no state of the teacher {name!r}, which starts anew.")
        elif bool(saved_state) != has_state:
            sentences.append(f"the checkpoint's state of the teacher {name!r} is that of another kind; dropped it.")
        elif has_state and (problem := load_or_keep(teacher, saved_state)):
            sentences.append(f"the checkpoint's state of the teacher {name!r} does not fit ({problem}); dropped it.")
    return sentences


class HasState(Protocol):
    """A teacher, a gate, or anything else whose state is kept in checkpoints."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore a state."""


def load_or_keep(target: HasState, saved_state: Any) -> str:
    """Restore a state if it fits; otherwise the target keeps the one that it has.

    Args:
        target: A teacher or a gate; its class may be the user's own.
        saved_state: The state from a checkpoint.

    Returns:
        Why the state does not fit; empty if it does.
    """
    state_before = deepcopy(target.state_dict())
    try:
        target.load_state_dict(saved_state)
    except Exception as error:
        with suppress(Exception):
            target.load_state_dict(state_before)
        return f"{type(error).__name__}: {error}"
    return ""
