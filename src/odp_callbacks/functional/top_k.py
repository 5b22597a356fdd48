r"""How far the likeliest tokens of student and teacher agree, and how probable each model finds those of the other.

With :math:`S_p, S_q` the :math:`k` likeliest tokens of the student's policy :math:`p` and of the teacher's :math:`q`:

- **top-k overlap** :math:`|S_p \cap S_q| / k` (arXiv:2604.13016, eq. 6);
- **overlap advantage** :math:`\frac{1}{|S|} \sum_{v \in S} \bar p_v (\ln \bar q_v - \ln \bar p_v)` on
  :math:`S = S_p \cap S_q`, where both policies are renormalised (eq. 7). It is
  :math:`-KL(\bar p \| \bar q) / |S|`: never above 0, and 0 where the two agree on the tokens that they share;
- **mass on the other's top k** :math:`\sum_{v \in S_q} p_v` and :math:`\sum_{v \in S_p} q_v`.
"""

import math

import torch
from torch import Tensor

from odp_callbacks.functional.working_precision import check_logits, working_dtype

TOP_K = 16
"""Number of likeliest tokens, as in arXiv:2604.13016."""


@torch.no_grad()
def top_k_predictors(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, top_k: int = TOP_K
) -> dict[str, Tensor]:
    r"""Compare the likeliest tokens of student and teacher.

    A token that either model excludes (logit :math:`-\infty`) is not shared. Tokens of equal probability at the last
    place are taken as ``torch.topk`` takes them. verl logs another overlap advantage under nearly the same name: it
    weights by the teacher, renormalises nothing, and is 0 where no token is shared.

    Args:
        student_logits: ``(..., V)``, any floating dtype; carries no gradient.
        teacher_logits: ``(..., V)``, any floating dtype.
        temperature: Divides both models' logits.
        top_k: The number of likeliest tokens; all tokens if the vocabulary is smaller.

    Returns:
        ``(...)`` each, at least float32: ``top_k_overlap`` in [0, 1]; ``overlap_advantage`` in nats, at most 0, and NaN
        where no token is shared; ``student_mass_on_teacher_top_k`` and ``teacher_mass_on_student_top_k`` in [0, 1].

    Raises:
        TypeError: If the logits are not floating-point tensors.
        ValueError: If the shapes differ, or ``temperature`` or ``top_k`` is not positive.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.6, 0.2]).log()
        >>> figures = top_k_predictors(student, teacher, top_k=1)  # the student's is token 0, the teacher's token 1
        >>> round(float(figures["top_k_overlap"]), 4), round(float(figures["student_mass_on_teacher_top_k"]), 4)
        (0.0, 0.3)
    """
    _check_arguments(student_logits, teacher_logits, temperature, top_k)
    dtype = working_dtype(student_logits, teacher_logits)
    student, teacher = (logits.to(dtype) / temperature for logits in (student_logits, teacher_logits))
    count = min(top_k, student.shape[-1])
    student_tokens, teacher_tokens = student.topk(count, dim=-1).indices, teacher.topk(count, dim=-1).indices
    # Only a few log-probabilities are needed, so the vocabulary is never normalised.
    student_norm, teacher_norm = student.logsumexp(dim=-1, keepdim=True), teacher.logsumexp(dim=-1, keepdim=True)
    student_on_own = student.gather(-1, student_tokens) - student_norm
    teacher_on_student = teacher.gather(-1, student_tokens) - teacher_norm
    student_on_teacher = student.gather(-1, teacher_tokens) - student_norm
    is_shared = (student_tokens[..., :, None] == teacher_tokens[..., None, :]).any(dim=-1)
    is_shared &= torch.isfinite(student_on_own) & torch.isfinite(teacher_on_student)
    return {
        "top_k_overlap": is_shared.sum(dim=-1).to(dtype) / count,
        "overlap_advantage": _overlap_advantage(student_on_own, teacher_on_student, is_shared),
        "student_mass_on_teacher_top_k": student_on_teacher.exp().sum(dim=-1).clamp(max=1),
        "teacher_mass_on_student_top_k": teacher_on_student.exp().sum(dim=-1).clamp(max=1),
    }


def _overlap_advantage(student: Tensor, teacher: Tensor, is_shared: Tensor) -> Tensor:
    """The advantage ``(...)`` from log-probabilities ``(..., k)`` of the same tokens; NaN where none is shared."""
    none_shared = ~is_shared.any(dim=-1, keepdim=True)
    # Where no token is shared all of them stay, so that the softmax below exists; the result is replaced by NaN.
    student, teacher = (
        torch.log_softmax(
            torch.where(none_shared, torch.zeros_like(part), part.masked_fill(~is_shared, -math.inf)), dim=-1
        )
        for part in (student, teacher)
    )
    difference = torch.where(is_shared, teacher - student, 0)
    mean = (student.exp() * difference).sum(dim=-1) / is_shared.sum(dim=-1)
    return torch.where(none_shared[..., 0], math.nan, mean)


def _check_arguments(student_logits: Tensor, teacher_logits: Tensor, temperature: float, top_k: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the arguments fit each other."""
    check_logits(student_logits, teacher_logits, temperature)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"`top_k` must be a positive integer, but {top_k!r} was given.")
