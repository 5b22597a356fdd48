"""Is my teacher helping? Gradient alignment of on-policy distillation, measured while you train."""

from odp_callbacks.callback import GradientAlignmentCallback
from odp_callbacks.distillation import OnPolicyDistillation
from odp_callbacks.engine import (
    AdapterTeacher,
    BaseTeacher,
    EMATeacher,
    ModelTeacher,
    ProbeConfig,
    Teacher,
    diagnose,
)
from odp_callbacks.gate_callback import GateCallback
from odp_callbacks.gates import (
    AlignmentGate,
    IncorrectRolloutGate,
    TeacherRouter,
    Tokens,
    gate_loss,
    score_rules,
    tokens_of,
)
from odp_callbacks.metrics import GradientAlignment
from odp_callbacks.trainer_callback import GradientAlignmentTrainerCallback
from odp_callbacks.trl_gate import gate_trainer

__all__ = [
    "AdapterTeacher",
    "AlignmentGate",
    "BaseTeacher",
    "EMATeacher",
    "GateCallback",
    "GradientAlignment",
    "GradientAlignmentCallback",
    "GradientAlignmentTrainerCallback",
    "IncorrectRolloutGate",
    "ModelTeacher",
    "OnPolicyDistillation",
    "ProbeConfig",
    "Teacher",
    "TeacherRouter",
    "Tokens",
    "diagnose",
    "gate_loss",
    "gate_trainer",
    "score_rules",
    "tokens_of",
]
