"""Student and teacher as log-probabilities on the support of a divergence, and whether the two agree there."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from odp_callbacks.functional.working_precision import working_dtype


class LogPolicies(NamedTuple):
    """Both models' log-probabilities on the support of a divergence.

    Attributes:
        student: ``(..., V)``, -inf outside the support.
        teacher: ``(..., V)``, -inf outside the support.
        equal: ``(..., 1)`` bool: whether the two policies agree on the support up to rounding.
        beta: The divergence as a member of the JSD family: 0 is forward KL, 1 is reverse KL.
    """

    student: Tensor
    teacher: Tensor
    equal: Tensor
    beta: float


def log_policies(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, top_k: int | None, temperature: float
) -> LogPolicies:
    """Normalise both models' logits on the support of a divergence of the JSD family.

    Args:
        student_logits: ``(..., V)``, any floating dtype.
        teacher_logits: ``(..., V)``, any floating dtype.
        beta: The divergence: 0 is forward KL, 1 is reverse KL.
        top_k: Restrict the support to the most likely tokens of the teacher (``beta`` below 1) and of the student
            (``beta`` above 0); None for all tokens.
        temperature: Divides both models' logits.

    Returns:
        The log-probabilities, at least in float32.
    """
    dtype = working_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    support = _support(student, teacher, beta, top_k)
    equal = _equal_up_to_rounding(student, teacher, support, _coarsest_rounding(student_logits, teacher_logits))
    student, teacher = (logits.masked_fill(~support, -math.inf) / temperature for logits in (student, teacher))
    return LogPolicies(torch.log_softmax(student, dim=-1), torch.log_softmax(teacher, dim=-1), equal, beta)


def _support(student: Tensor, teacher: Tensor, beta: float, top_k: int | None) -> Tensor:
    """``(..., V)`` bool: the tokens that a divergence of the JSD family is restricted to."""
    everywhere = torch.ones_like(student, dtype=torch.bool)
    if top_k is None or top_k >= student.shape[-1]:
        return everywhere
    support = torch.zeros_like(everywhere)
    if beta > 0:
        support = support.scatter(-1, student.topk(top_k, dim=-1).indices, True)
    if beta < 1:
        support = support.scatter(-1, teacher.topk(top_k, dim=-1).indices, True)
    return support


def teacher_equals_student(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Whether the teacher's logits are the student's plus a constant, up to rounding.

    Args:
        student_logits: ``(..., V)``, any floating dtype.
        teacher_logits: ``(..., V)``, any floating dtype.

    Returns:
        ``(..., 1)`` bool.

    Examples:
        >>> import torch
        >>> student_logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> teacher_equals_student(student_logits, torch.tensor([[2.0, 3.0], [2.0, 3.5]]))
        tensor([[ True],
                [False]])
    """
    dtype = working_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    everywhere = torch.ones_like(student, dtype=torch.bool)
    return _equal_up_to_rounding(student, teacher, everywhere, _coarsest_rounding(student_logits, teacher_logits))


def _coarsest_rounding(*logits: Tensor) -> float:
    """The largest relative rounding error among the dtypes of the given tensors."""
    return max(torch.finfo(tensor.dtype).eps for tensor in logits)


def _equal_up_to_rounding(student: Tensor, teacher: Tensor, support: Tensor, eps: float) -> Tensor:
    """``(..., 1)``: whether ``teacher - student`` is constant on the support, up to a rounding of ``eps``."""
    # In half precision only the rounding of the inputs is allowed for. In wider dtypes the rounding of the kernels
    # that computed the logits counts too, because their order of summation changes with the shape of the batch.
    allowance = 0.51 if eps > 1e-6 else 4.0
    student, teacher = student.detach(), teacher.detach()
    likeliest = student.masked_fill(~support, -math.inf).argmax(dim=-1, keepdim=True)
    deviation = ((teacher - student) - (teacher - student).gather(-1, likeliest)).abs()
    magnitude = teacher.abs() + student.abs()
    rounding = allowance * eps * (magnitude + magnitude.gather(-1, likeliest))
    # A token that only one model excludes (-inf) is a difference, not rounding. Where both exclude it, they agree.
    both_finite = torch.isfinite(student) & torch.isfinite(teacher)
    both_exclude = torch.isneginf(student) & torch.isneginf(teacher)
    agree = (both_finite & (deviation <= rounding)) | both_exclude | ~support
    return agree.all(dim=-1, keepdim=True)


def token_log_probs(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of the token that was chosen at each position.

    Args:
        logits: ``(N, V)``, any floating dtype.
        token_ids: ``(N,)``, integer.
        temperature: Divides the logits.

    Returns:
        ``(N,)`` in nats, at least in float32.

    Examples:
        >>> import torch
        >>> token_log_probs(torch.tensor([[0.0, 0.0], [0.0, 100.0]]), torch.tensor([1, 1]), 1.0)
        tensor([-0.6931,  0.0000])
    """
    scaled = logits.to(working_dtype(logits)) / temperature
    return scaled.gather(-1, token_ids[:, None])[:, 0] - scaled.logsumexp(dim=-1)
