"""What a checkpoint keeps of a monitor; what does not fit when it is restored is dropped with a sentence."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from odp_callbacks.callbacks.teacher_updates import teacher_states
from odp_callbacks.engine.teachers.saved_states import restore_teachers

if TYPE_CHECKING:
    from odp_callbacks.callbacks.monitor import Monitor

COUNTS = ("probe_count", "last_step", "last_probe_step")
"""Attributes of a monitor that a checkpoint keeps as they are."""


def monitor_state(monitor: "Monitor") -> dict[str, Any]:
    """Return what a resumed run needs to continue where this one stopped."""
    state = {
        **{count: getattr(monitor, count) for count in COUNTS},
        "questions": monitor.questions.state_dict(),
        "random_stream": monitor.random_stream.get_state(),
        "time_budget": monitor.time_budget.state_dict(),
        "step_gain": monitor.step_gain.state_dict(),
        "pooled_updates": monitor.pooled_updates.state_dict(),
        "run": monitor.run_records.run,
        "teachers": teacher_states(monitor.teachers, monitor.failures),
    }
    gate_state = None
    with monitor.failures.guarded(None, "a checkpoint is saved without the state of `gate`"):
        gate_state = monitor.gate_learning.state_dict()
    return state if gate_state is None else {**state, "gate": gate_state}


def restore_monitor(monitor: "Monitor", state: Any) -> list[str]:
    """Restore a monitor's state part by part.

    Args:
        monitor: The monitor of this run.
        state: What :func:`monitor_state` returned in another run; a file may hold something else.

    Returns:
        A sentence about each part that was dropped.
    """
    sentences: list[str] = []
    sentences += restore_parts(
        state,
        {
            **{count: partial(_restore_count, monitor, count) for count in COUNTS},
            "questions": monitor.questions.load_state_dict,
            "random_stream": monitor.random_stream.set_state,
            "time_budget": monitor.time_budget.load_state_dict,
            "step_gain": monitor.step_gain.load_state_dict,
            "pooled_updates": monitor.pooled_updates.load_state_dict,
            "run": monitor.run_records.restore,
            "teachers": lambda saved_states: sentences.extend(restore_teachers(monitor.teachers, saved_states)),
        },
    )
    gate_state = state.get("gate") if isinstance(state, Mapping) else None
    if gate_state is not None and list(state.get("teachers", ())) != list(monitor.teachers):
        sentences.append("the checkpoint's gate has learned from other teachers; dropped its state.")
        gate_state = None
    monitor.gate_learning.load_state_dict(gate_state)
    return sentences


def restore_teachers_alone(monitor: "Monitor", state: Any) -> list[str]:
    """Give the teachers the states of a checkpoint that is only validated; the training's own state stays.

    Args:
        monitor: The monitor.
        state: As in :func:`restore_monitor`.

    Returns:
        A sentence about each state that was dropped.
    """
    sentences: list[str] = []
    restore = {"teachers": lambda saved_states: sentences.extend(restore_teachers(monitor.teachers, saved_states))}
    sentences += restore_parts(state, restore)
    return sentences


def _restore_count(monitor: "Monitor", count: str, value: object) -> None:
    setattr(monitor, count, checked_integer(value, -1))


def restore_parts(state: object, parts: Mapping[str, Callable[[Any], object]]) -> list[str]:
    """Restore each part of a state that is there and fits; the others stay as they are.

    Args:
        state: A state as it was saved, perhaps by another version or for another run.
        parts: For each part by name, the function that restores it. It raises an exception, and changes nothing, if the
            part does not fit.

    Returns:
        A sentence about each part that was dropped.

    Examples:
        >>> kept = []
        >>> restore_parts({"seed": 3}, {"seed": kept.append, "position": kept.append})
        ['the checkpoint has no `position`, which starts anew.']
        >>> kept
        [3]
    """
    if not isinstance(state, Mapping):
        return ["the checkpoint's state of this callback cannot be read; dropped it."]
    sentences = []
    for name, restore in parts.items():
        if name not in state:
            sentences.append(f"the checkpoint has no `{name}`, which starts anew.")
            continue
        try:
            restore(state[name])
        except Exception as error:  # anything can stand in a file
            problem = f"{type(error).__name__}: {error}"
            sentences.append(f"the checkpoint's `{name}` does not fit ({problem}); dropped it.")
    return sentences


def checked_integer(value: object, minimum: int) -> int:
    """Return an integer that was saved.

    Raises:
        ValueError: If it is no integer, or smaller than ``minimum``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"it must be an integer from {minimum} on, but is {value!r}")
    return value
