"""The mathematics: pure functions on tensors, without models of their own or any state."""

from odp_callbacks.functional.alignment import gradient_alignment
from odp_callbacks.functional.distillation_losses import (
    Divergence,
    distillation_logit_gradient,
    distillation_loss,
    node_predictors,
)
from odp_callbacks.functional.gradients import lora_gradients, lora_parameters
from odp_callbacks.functional.ideal_gradient import ideal_logit_gradient
from odp_callbacks.functional.top_k import top_k_predictors
from odp_callbacks.functional.updates import leave_one_out_advantages, step_gain, update_gain

__all__ = [
    "Divergence",
    "distillation_logit_gradient",
    "distillation_loss",
    "gradient_alignment",
    "ideal_logit_gradient",
    "leave_one_out_advantages",
    "lora_gradients",
    "lora_parameters",
    "node_predictors",
    "step_gain",
    "top_k_predictors",
    "update_gain",
]
