"""Gates: functions that weight each token of the distillation loss, some of which learn from the probes."""

from odp_callbacks.functional.tokens import Tokens, policy_features, tokens_of
from odp_callbacks.gates.alignment import AlignmentGate
from odp_callbacks.gates.correctness import IncorrectRolloutGate
from odp_callbacks.gates.loss import GatedLoss, check_gate, gate_loss, gate_weights
from odp_callbacks.gates.node_scoring import tokens_of_report
from odp_callbacks.gates.protocols import Gate
from odp_callbacks.gates.router import TeacherRouter
from odp_callbacks.gates.rules import RULES
from odp_callbacks.gates.scoring import RuleScore, score_rules

__all__ = [
    "RULES",
    "AlignmentGate",
    "Gate",
    "GatedLoss",
    "IncorrectRolloutGate",
    "RuleScore",
    "TeacherRouter",
    "Tokens",
    "check_gate",
    "gate_loss",
    "gate_weights",
    "policy_features",
    "score_rules",
    "tokens_of",
    "tokens_of_report",
]
