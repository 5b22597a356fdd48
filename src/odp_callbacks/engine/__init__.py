"""The engine: torch, transformers and peft only; usable alone as a training-free diagnostic."""

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.probe import Probe, diagnose
from odp_callbacks.engine.rewards import RewardError
from odp_callbacks.engine.teachers import AdapterTeacher, BaseTeacher, EMATeacher, ModelTeacher, Teacher
from odp_callbacks.engine.tree.nodes import EntropyNodes, UniformNodes, every_node, exponential_windows

__all__ = [
    "AdapterTeacher",
    "BaseTeacher",
    "EMATeacher",
    "EntropyNodes",
    "ModelTeacher",
    "Probe",
    "ProbeConfig",
    "RewardError",
    "Teacher",
    "UniformNodes",
    "diagnose",
    "every_node",
    "exponential_windows",
]
