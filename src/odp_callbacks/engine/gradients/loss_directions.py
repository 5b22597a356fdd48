"""Descent directions of a distillation loss on the logits, for a named divergence or a user's own loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from odp_callbacks.functional.distillation_losses import Divergence, check_divergence, distillation_logit_gradient
from odp_callbacks.functional.policies import teacher_equals_student

UserLoss = Callable[[Tensor, Tensor], Tensor]
"""``f(student_logits, teacher_logits)``: from ``(..., V)`` each to a loss for each token, ``(...)``."""

Direction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From student logits ``(N, V)``, teacher logits ``(N, V')`` and tokens ``(N,)`` to descent directions ``(N, V)``."""


def distillation_direction(
    divergence: Divergence | UserLoss, beta: float | None, top_k: int | None, temperature: float
) -> Direction:
    """Make the function that computes the descent direction of a distillation loss on the student's logits.

    Args:
        divergence: The name of a loss, or a differentiable function of both models' logits. A function receives the
            logits as they are; it must apply a temperature itself.
        beta: For ``"jsd"``.
        top_k: Restricts a named loss to that many tokens.
        temperature: Divides both models' logits in a named loss.

    Returns:
        A function of student logits, teacher logits and sampled tokens.

    Raises:
        ValueError: If the name is unknown, or an option does not apply to it.
    """
    if not callable(divergence):
        check_divergence(divergence, beta, top_k)

    def direction(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
        shared_size = teacher_logits.shape[-1]
        # Student logits beyond the teacher's vocabulary are padding rows; they do not enter the loss.
        shared_logits = student_logits[..., :shared_size]
        if callable(divergence):
            descent = _descent_by_autograd(divergence, shared_logits, teacher_logits)
        else:
            descent = distillation_logit_gradient(
                shared_logits,
                teacher_logits,
                divergence,
                beta=beta,
                tokens=tokens if divergence == "sampled_token" else None,
                top_k=top_k,
                temperature=temperature,
            )
        return torch.nn.functional.pad(descent, (0, student_logits.shape[-1] - shared_size))

    return direction


def _descent_by_autograd(loss: UserLoss, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Minus the gradient of a user's loss on the student's logits; exact zeros where both models agree."""
    with torch.enable_grad():
        logits = student_logits.detach().requires_grad_()
        token_losses = loss(logits, teacher_logits.detach())
        if not isinstance(token_losses, Tensor) or token_losses.shape != logits.shape[:-1]:
            given = tuple(token_losses.shape) if isinstance(token_losses, Tensor) else type(token_losses).__name__
            raise ValueError(
                f"`divergence` must return one loss for each token, shape {tuple(logits.shape[:-1])}, "
                f"but it gave {given}."
            )
        descent = -torch.autograd.grad(token_losses.sum(), logits)[0]
    # Where the teacher equals the student, what remains of the gradient is rounding error.
    is_rounding = descent.abs().amax(dim=-1, keepdim=True) <= 64 * torch.finfo(logits.dtype).eps
    return descent.masked_fill(is_rounding & teacher_equals_student(logits.detach(), teacher_logits), 0)
