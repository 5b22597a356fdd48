"""Lets the teachers follow the student, and keeps their states in checkpoints; one that fails costs only itself."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from odp_callbacks.callbacks.failures import FailureHandler
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.engine.teachers import Teacher


def update_teachers(
    teachers: Mapping[str, Teacher], student: nn.Module, context: TrainerContext, failures: FailureHandler
) -> None:
    """Let every teacher follow the student after an optimizer step."""
    for name, teacher in teachers.items():
        with failures.guarded(context, f"the teacher {name!r} could not follow the student"):
            teacher.update(student, context.step)


def teacher_states(teachers: Mapping[str, Teacher], failures: FailureHandler) -> dict[str, Any]:
    """The states of the teachers by name, without those of teachers that fail."""
    states = {}
    for name, teacher in teachers.items():
        with failures.guarded(None, f"a checkpoint is saved without the state of the teacher {name!r}"):
            states[name] = teacher.state_dict()
    return states
