"""Distillation losses, their descent directions on the student's logits, and cheap predictors of alignment.

Every divergence here pulls on the logits as ``p_k (h_k - sum_j p_j h_j)``: it acts as if ``h_k`` were the value of
token ``k``. Reverse KL believes in ``ln(q_k / p_k)``, forward KL in ``q_k / p_k - 1``, the generalised
Jensen-Shannon divergence in something between.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from odp_callbacks.functional.working_precision import floating, positive_temperature, working

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "sampled_token"]


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence = "reverse_kl",
    *,
    beta: float | None = None,
    tokens: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Per-token distillation loss; its gradient is minus :func:`distillation_logit_gradient`.

    ``"reverse_kl"`` is :math:`KL(p\|q)`, ``"forward_kl"`` :math:`KL(q\|p)`, ``"jsd"`` the generalised
    Jensen-Shannon divergence of GKD (arXiv:2306.13649) and ``"sampled_token"`` the policy-gradient form
    :math:`-\mathrm{sg}[\ln q_y - \ln p_y] \ln p_y` of reverse KL, where ``sg`` stops the gradient.

    Args:
        student_logits: ``(..., V)``, any floating dtype; :math:`p` is their softmax at the temperature.
        teacher_logits: ``(..., V)``; :math:`q` likewise. No gradient is stopped here.
        divergence: One of the four names.
        beta: For ``"jsd"`` only, in [0, 1], default 0.5: the mixture is :math:`\beta q + (1-\beta) p`;
            0 is forward KL, 1 is reverse KL.
        tokens: ``(...)``, integer: the sampled tokens :math:`y`; for ``"sampled_token"`` only.
        top_k: Restrict both distributions to ``top_k`` tokens and renormalise: the teacher's for forward KL, the
            student's for reverse KL and the sampled token, the union for JSD (the support rule of TRL). A sampled
            token outside contributes nothing.
        temperature: Divides both models' logits.

    Returns:
        ``(...)``, in nats, dtype of ``student_logits``.

    Raises:
        TypeError: If the logits are not floating-point tensors.
        ValueError: If shapes differ, or an option is missing, out of range or of no use for this divergence.

    Examples:
        >>> import torch
        >>> distillation_loss(torch.zeros(2), torch.tensor([0.0, 1.0]), "forward_kl")
        tensor(0.1109)
    """
    lp, lq, _, beta = _prepare(student_logits, teacher_logits, divergence, beta, tokens, top_k, temperature)
    if divergence == "sampled_token":
        assert tokens is not None
        lp_y, lq_y = (x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for x in (lp, lq))
        outside = lp_y == -math.inf
        advantage = (lq_y - lp_y).detach().masked_fill(outside, 0)
        loss = -advantage * lp_y.masked_fill(outside, 0)
    elif beta == 1.0:
        loss = _kl(lp, lq)
    elif beta == 0.0:
        loss = _kl(lq, lp)
    else:
        mixture = _log_mixture(lp, lq, beta)
        loss = beta * _kl(lq, mixture) + (1 - beta) * _kl(lp, mixture)
    return loss.to(student_logits.dtype)


def distillation_logit_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence = "reverse_kl",
    *,
    beta: float | None = None,
    tokens: Tensor | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Descent direction of a distillation loss on the student's logits, in closed form.

    With :math:`p, q` the softmax of the logits over :math:`\tau`, :math:`\rho_k = \ln q_k - \ln p_k`:

    - reverse KL: :math:`\frac1\tau\, p_k (\rho_k - \sum_j p_j \rho_j)`
    - forward KL: :math:`\frac1\tau\, (q_k - p_k)`
    - JSD: :math:`\frac1\tau\, p_k (h_k - \sum_j p_j h_j)` with
      :math:`h_k = (1-\beta) \ln(\beta e^{\rho_k} + 1 - \beta)`
    - sampled token: :math:`\frac1\tau\, \rho_y (1[k = y] - p_k)`

    Where the teacher's logits equal the student's, or differ by a constant, up to the rounding of their dtype, the
    direction is exactly zero: such a teacher says nothing, and its alignment is undefined.

    Arguments, errors and the meaning of ``top_k`` are those of :func:`distillation_loss`.

    Returns:
        ``(..., V)``, dtype of ``student_logits``, in nats per unit of logit.

    Examples:
        >>> import torch
        >>> distillation_logit_gradient(torch.zeros(2), torch.tensor([0.0, 1.0]), "forward_kl")
        tensor([-0.2311,  0.2311])
    """
    lp, lq, silent, beta = _prepare(student_logits, teacher_logits, divergence, beta, tokens, top_k, temperature)
    p = lp.exp()
    # Outside the support both are -inf: their ratio means nothing, and no pull comes from there.
    ratio = torch.where(p > 0, lq - lp, 0)
    if divergence == "sampled_token":
        assert tokens is not None
        at = tokens.unsqueeze(-1)
        inside = p.gather(-1, at) > 0
        one_hot = torch.zeros_like(p).scatter(-1, at, 1.0)
        direction = torch.where(inside, ratio.gather(-1, at) * (one_hot - p), 0)
    elif beta == 0.0:
        direction = lq.exp() - p
    else:
        if beta == 1.0:
            h = ratio
        else:
            # log1p(beta * expm1(ratio)) is exact near ratio = 0; for large ratios expm1 overflows, logaddexp does not.
            near = torch.log1p(beta * torch.expm1(ratio.clamp(max=1.0)))
            far = torch.logaddexp(ratio + math.log(beta), torch.full_like(ratio, math.log1p(-beta)))
            h = (1 - beta) * torch.where(ratio < 1.0, near, far)
        direction = p * (h - torch.where(p > 0, p * h, 0).sum(dim=-1, keepdim=True))
    direction = torch.where(silent, 0, direction)
    return (direction / temperature).to(student_logits.dtype)


def node_predictors(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    r"""Cheap predictors of alignment: divergences, cosine and entropies of student and teacher.

    Args:
        student_logits: ``(..., V)``.
        teacher_logits: ``(..., V)``.
        temperature: Divides both.

    Returns:
        ``forward_kl`` :math:`KL(q\|p)`, ``reverse_kl`` :math:`KL(p\|q)`, ``js`` (the symmetric Jensen-Shannon
        divergence), ``cosine`` of :math:`p` and :math:`q`, ``student_entropy``, ``teacher_entropy``: each ``(...)``,
        nats, at least float32.

    Examples:
        >>> import torch
        >>> node_predictors(torch.zeros(4), torch.zeros(4))["student_entropy"]
        tensor(1.3863)
    """
    lp, lq, _, _ = _prepare(student_logits, teacher_logits, "reverse_kl", None, None, None, temperature)
    mixture = _log_mixture(lp, lq, 0.5)
    p, q = lp.exp(), lq.exp()
    return {
        "forward_kl": _kl(lq, lp),
        "reverse_kl": _kl(lp, lq),
        "js": (_kl(lp, mixture) + _kl(lq, mixture)) / 2,
        "cosine": F.cosine_similarity(p, q, dim=-1),
        "student_entropy": -torch.special.xlogy(p, p).sum(-1),
        "teacher_entropy": -torch.special.xlogy(q, q).sum(-1),
    }


def _kl(lp: Tensor, lq: Tensor) -> Tensor:
    """``KL(p || q)`` from log-probabilities ``(..., V)``; tokens with ``p = 0`` contribute nothing."""
    inside = lp > -math.inf
    # Masked before the product: 0 * inf is NaN, and so is its gradient.
    difference = torch.where(inside, lp, 0) - torch.where(inside, lq, 0)
    return (lp.exp() * difference).sum(dim=-1)


def _log_mixture(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    """``ln(beta q + (1 - beta) p)``, beta in (0, 1); -inf where both are zero."""
    nowhere = torch.isneginf(lp) & torch.isneginf(lq)
    # Filled first: the gradient of logaddexp(-inf, -inf) is NaN.
    lp, lq = lp.masked_fill(nowhere, 0), lq.masked_fill(nowhere, 0)
    mixture = torch.logaddexp(lq + math.log(beta), lp + math.log1p(-beta))
    return mixture.masked_fill(nowhere, -math.inf)


def _prepare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str,
    beta: float | None,
    tokens: Tensor | None,
    top_k: int | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Check the arguments; return log p, log q on the support, where the teacher is silent, and the effective beta."""
    floating("student_logits", student_logits)
    floating("teacher_logits", teacher_logits)
    positive_temperature(temperature)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`teacher_logits` must have the shape of `student_logits`, "
            f"but {tuple(teacher_logits.shape)} and {tuple(student_logits.shape)} were given."
        )
    check_divergence(divergence, beta, top_k)
    if (divergence == "sampled_token") != (tokens is not None):
        need = "needs" if tokens is None else "is the only divergence that takes"
        raise ValueError(f"'sampled_token' {need} `tokens`, but `divergence` is {divergence!r}.")
    if tokens is not None and tokens.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"`tokens` must have shape {tuple(student_logits.shape[:-1])}, but {tuple(tokens.shape)} was given."
        )
    dtype = working(student_logits, teacher_logits)
    z, t = student_logits.to(dtype), teacher_logits.to(dtype)
    effective = {"forward_kl": 0.0, "jsd": 0.5 if beta is None else float(beta)}.get(divergence, 1.0)
    support = torch.ones_like(z, dtype=torch.bool)
    if top_k is not None and top_k < z.shape[-1]:
        support = torch.zeros_like(support)
        if effective > 0:
            support = support.scatter(-1, z.topk(top_k, dim=-1).indices, True)
        if effective < 1:
            support = support.scatter(-1, t.topk(top_k, dim=-1).indices, True)
    silent = _silent(z, t, support, max(torch.finfo(x.dtype).eps for x in (student_logits, teacher_logits)))
    z, t = (x.masked_fill(~support, -math.inf) / temperature for x in (z, t))
    return torch.log_softmax(z, dim=-1), torch.log_softmax(t, dim=-1), silent, effective


def teacher_equals_student(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``(..., 1)`` bool: where the teacher's logits are the student's plus a constant, up to rounding."""
    dtype = working(student_logits, teacher_logits)
    z, t = student_logits.to(dtype), teacher_logits.to(dtype)
    eps = max(torch.finfo(x.dtype).eps for x in (student_logits, teacher_logits))
    return _silent(z, t, torch.ones_like(z, dtype=torch.bool), eps)


def _silent(z: Tensor, t: Tensor, support: Tensor, eps: float) -> Tensor:
    """``(..., 1)``: where ``t - z`` is one constant over the support, up to the rounding ``eps`` of the inputs."""
    # Half precision: only the rounding of the inputs themselves. Wider: also that of the kernels that made them,
    # which differ in the order of their sums from one batch shape to the next.
    allowance = 0.51 if eps > 1e-6 else 4.0
    z, t = z.detach(), t.detach()
    top = z.masked_fill(~support, -math.inf).argmax(dim=-1, keepdim=True)
    deviation = ((t - z) - (t - z).gather(-1, top)).abs()
    size = t.abs() + z.abs()
    rounding = allowance * eps * (size + size.gather(-1, top))
    # -inf in one alone is a statement, not rounding; a token that neither can take agrees.
    close = torch.isfinite(z) & torch.isfinite(t) & (deviation <= rounding)
    agree = close | (torch.isneginf(z) & torch.isneginf(t)) | ~support
    return agree.all(dim=-1, keepdim=True)


def check_divergence(divergence: str, beta: float | None = None, top_k: int | None = None) -> None:
    """Raise ``ValueError`` unless the divergence's name and options fit each other."""
    if divergence not in get_args(Divergence):
        raise ValueError(f"`divergence` must be one of {get_args(Divergence)} or a function, got {divergence!r}.")
    if beta is not None and divergence != "jsd":
        raise ValueError(f"`beta` belongs to divergence 'jsd', but `divergence` is {divergence!r}.")
    if beta is not None and not 0 <= beta <= 1:
        raise ValueError(f"`beta` must lie in [0, 1], but {beta!r} was given.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"`top_k` must be a positive integer or None, but {top_k!r} was given.")
