"""Is my teacher helping? Gradient alignment of on-policy distillation, measured while you train."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # type checkers and editors see plain imports; at run time a name is imported when it is first used
    from odp_callbacks.analysis.probe_plan import plan_probe
    from odp_callbacks.callbacks.lightning import GradientAlignmentCallback
    from odp_callbacks.callbacks.loss_weights import LossWeightCallback
    from odp_callbacks.callbacks.transformers import GradientAlignmentTrainerCallback
    from odp_callbacks.distillation import OnPolicyDistillation
    from odp_callbacks.engine.answer_rewards import answer_reward
    from odp_callbacks.engine.config import ProbeConfig
    from odp_callbacks.engine.dataset_columns import preset_rows, with_columns
    from odp_callbacks.engine.demonstration_summaries import summarise_demonstrations
    from odp_callbacks.engine.demonstrations import DemonstrationOptions, sample_demonstrations
    from odp_callbacks.engine.diagnosis import diagnose
    from odp_callbacks.engine.probe import Probe
    from odp_callbacks.engine.teacher_responses import sample_teacher_responses
    from odp_callbacks.engine.teachers import (
        AdapterTeacher,
        BaseTeacher,
        EMATeacher,
        ModelTeacher,
        ServedTeacher,
        Teacher,
    )
    from odp_callbacks.engine.teachers.demonstration_contexts import demonstration_context
    from odp_callbacks.engine.training_rollouts import TrainingRollout
    from odp_callbacks.engine.tree.nodes import (
        BalancedNodes,
        EntropyNodes,
        UniformNodes,
        every_node,
        exponential_windows,
    )
    from odp_callbacks.functional.tokens import Tokens, tokens_of
    from odp_callbacks.gates.alignment import AlignmentGate
    from odp_callbacks.gates.correctness import IncorrectRolloutGate
    from odp_callbacks.gates.loss import gate_loss
    from odp_callbacks.gates.router import TeacherRouter
    from odp_callbacks.gates.rules import (
        correct_rollouts,
        everything,
        high_entropy,
        incorrect_rollouts,
        pass_rate,
        position,
        prefix,
        teacher_confidence,
        teacher_margin,
    )
    from odp_callbacks.gates.scoring import score_rules
    from odp_callbacks.gates.trl import gate_trainer
    from odp_callbacks.metrics import GradientAlignment
    from odp_callbacks.records import ProbeReport

_MODULES = {
    "analysis.probe_plan": ["plan_probe"],
    "callbacks.lightning": ["GradientAlignmentCallback"],
    "callbacks.loss_weights": ["LossWeightCallback"],
    "callbacks.transformers": ["GradientAlignmentTrainerCallback"],
    "distillation": ["OnPolicyDistillation"],
    "engine.answer_rewards": ["answer_reward"],
    "engine.config": ["ProbeConfig"],
    "engine.dataset_columns": ["preset_rows", "with_columns"],
    "engine.demonstration_summaries": ["summarise_demonstrations"],
    "engine.demonstrations": ["DemonstrationOptions", "sample_demonstrations"],
    "engine.diagnosis": ["diagnose"],
    "engine.probe": ["Probe"],
    "engine.teacher_responses": ["sample_teacher_responses"],
    "engine.teachers": ["AdapterTeacher", "BaseTeacher", "EMATeacher", "ModelTeacher", "ServedTeacher", "Teacher"],
    "engine.teachers.demonstration_contexts": ["demonstration_context"],
    "engine.training_rollouts": ["TrainingRollout"],
    "engine.tree.nodes": ["BalancedNodes", "EntropyNodes", "UniformNodes", "every_node", "exponential_windows"],
    "gates.alignment": ["AlignmentGate"],
    "gates.correctness": ["IncorrectRolloutGate"],
    "gates.loss": ["gate_loss"],
    "gates.router": ["TeacherRouter"],
    "gates.rules": [
        "correct_rollouts",
        "everything",
        "high_entropy",
        "incorrect_rollouts",
        "pass_rate",
        "position",
        "prefix",
        "teacher_confidence",
        "teacher_margin",
    ],
    "gates.scoring": ["score_rules"],
    "functional.tokens": ["Tokens", "tokens_of"],
    "gates.trl": ["gate_trainer"],
    "metrics": ["GradientAlignment"],
    "records": ["ProbeReport"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AdapterTeacher",
    "AlignmentGate",
    "BalancedNodes",
    "BaseTeacher",
    "DemonstrationOptions",
    "EMATeacher",
    "EntropyNodes",
    "GradientAlignment",
    "GradientAlignmentCallback",
    "GradientAlignmentTrainerCallback",
    "IncorrectRolloutGate",
    "LossWeightCallback",
    "ModelTeacher",
    "OnPolicyDistillation",
    "Probe",
    "ProbeConfig",
    "ProbeReport",
    "ServedTeacher",
    "Teacher",
    "TeacherRouter",
    "Tokens",
    "TrainingRollout",
    "UniformNodes",
    "__version__",
    "answer_reward",
    "correct_rollouts",
    "demonstration_context",
    "diagnose",
    "every_node",
    "everything",
    "exponential_windows",
    "gate_loss",
    "gate_trainer",
    "high_entropy",
    "incorrect_rollouts",
    "pass_rate",
    "plan_probe",
    "position",
    "prefix",
    "preset_rows",
    "sample_demonstrations",
    "sample_teacher_responses",
    "score_rules",
    "summarise_demonstrations",
    "teacher_confidence",
    "teacher_margin",
    "tokens_of",
    "with_columns",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: neither Lightning nor TRL is loaded for the records alone."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What an editor or ``dir`` shows."""
    return sorted({*globals(), *__all__})
