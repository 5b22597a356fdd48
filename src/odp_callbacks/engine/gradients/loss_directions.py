"""The distillation gradient on the logits, for a named divergence or the user's own loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from odp_callbacks.functional.divergences import (
    Divergence,
    check_divergence,
    distillation_logit_gradient,
    teacher_equals_student,
)

UserLoss = Callable[[Tensor, Tensor], Tensor]
"""``f(student_logits, teacher_logits)``, ``(..., V)`` each, to a loss for each token, ``(...)``."""

Direction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From student logits ``(N, V)``, teacher logits ``(N, V')`` and tokens ``(N,)`` to descent directions ``(N, V)``."""


def distillation_direction(
    divergence: Divergence | UserLoss, beta: float | None, top_k: int | None, temperature: float
) -> Direction:
    """Make the function that gives the descent direction of a distillation loss.

    Args:
        divergence: A name, or a differentiable function of both models' logits as they are: a temperature is its
            own affair.
        beta: For ``"jsd"``.
        top_k: Restricts a named loss to that many tokens.
        temperature: Of both models in a named loss.
    """
    if not callable(divergence):
        check_divergence(divergence, beta, top_k)

    def direction(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
        size = teacher_logits.shape[-1]
        # The student's rows beyond the teacher's vocabulary are padding: the loss does not see them.
        z = student_logits[..., :size]
        if callable(divergence):
            pulled = _descent(divergence, z, teacher_logits)
        else:
            pulled = distillation_logit_gradient(
                z,
                teacher_logits,
                divergence,
                beta=beta,
                tokens=tokens if divergence == "sampled_token" else None,
                top_k=top_k,
                temperature=temperature,
            )
        return torch.nn.functional.pad(pulled, (0, student_logits.shape[-1] - size))

    return direction


def _descent(loss: UserLoss, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    with torch.enable_grad():
        z = student_logits.detach().requires_grad_()
        value = loss(z, teacher_logits.detach())
        if not isinstance(value, Tensor) or value.shape != z.shape[:-1]:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"`divergence` must return one loss for each token, shape {tuple(z.shape[:-1])}, but it gave {given}."
            )
        pulled = -torch.autograd.grad(value.sum(), z)[0]
    # Where the teacher only repeats the student, what autograd leaves of the loss's gradient is rounding.
    rounding = pulled.abs().amax(dim=-1, keepdim=True) <= 64 * torch.finfo(z.dtype).eps
    return pulled.masked_fill(rounding & teacher_equals_student(z.detach(), teacher_logits), 0)
