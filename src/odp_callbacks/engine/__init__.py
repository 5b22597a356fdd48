"""The measurement itself; it needs torch, transformers and peft, and can be used alone as a diagnosis."""

from odp_callbacks.engine.config import ProbeConfig, ProbeOptions
from odp_callbacks.engine.diagnosis import diagnose
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.rewards import RewardError
from odp_callbacks.engine.teachers import AdapterTeacher, BaseTeacher, EMATeacher, ModelTeacher, ServedTeacher, Teacher
from odp_callbacks.engine.tree.nodes import BalancedNodes, EntropyNodes, UniformNodes, every_node, exponential_windows

__all__ = [
    "AdapterTeacher",
    "BalancedNodes",
    "BaseTeacher",
    "EMATeacher",
    "EntropyNodes",
    "ModelTeacher",
    "Probe",
    "ProbeConfig",
    "ProbeOptions",
    "RewardError",
    "ServedTeacher",
    "Teacher",
    "UniformNodes",
    "diagnose",
    "every_node",
    "exponential_windows",
]
