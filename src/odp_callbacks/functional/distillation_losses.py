"""Distillation losses, their descent directions on the student's logits, and cheap predictors of alignment.

Under reverse KL, forward KL and the generalised Jensen-Shannon divergence, the descent direction on the logits is
``p_k (h_k - sum_j p_j h_j)``, which has the form of the ideal gradient with ``h_k`` in place of the success of token
``k``. For reverse KL, ``h_k`` is ``ln(q_k / p_k)``; for forward KL, ``q_k / p_k - 1``; the Jensen-Shannon divergence
lies between them.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from odp_callbacks.functional.policies import LogPolicies, log_policies
from odp_callbacks.functional.working_precision import check_logits

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "sampled_token"]
"""Distillation losses that have a name."""


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

    ``"reverse_kl"`` is :math:`KL(p\|q)`, ``"forward_kl"`` is :math:`KL(q\|p)`, ``"jsd"`` is the generalised
    Jensen-Shannon divergence of GKD (arXiv:2306.13649), and ``"sampled_token"`` is the policy-gradient form
    :math:`-\mathrm{sg}[\ln q_y - \ln p_y] \ln p_y` of reverse KL, where ``sg`` stops the gradient.

    Args:
        student_logits: ``(..., V)``, any floating dtype; :math:`p` is their softmax at the temperature.
        teacher_logits: ``(..., V)``, any floating dtype; :math:`q` is their softmax at the temperature. The gradient
            reaches them, except for ``"sampled_token"``.
        divergence: One of the four names.
        beta: For ``"jsd"`` only, in [0, 1], 0.5 by default. The mixture is :math:`\beta q + (1-\beta) p`;
            0 is forward KL, 1 is reverse KL.
        tokens: ``(...)``, integer; the sampled tokens :math:`y`, for ``"sampled_token"`` only.
        top_k: Restrict both distributions to ``top_k`` tokens and renormalise them. The tokens are the teacher's for
            forward KL, the student's for reverse KL and the sampled token, and the union of both for JSD (as in TRL).
            A sampled token outside this set has loss 0.
        temperature: Divides both models' logits.

    Returns:
        ``(...)``, in nats, dtype of ``student_logits``.

    Raises:
        TypeError: If the logits are not floating-point tensors.
        ValueError: If shapes differ, or an option is missing, out of range or does not apply to this divergence.

    Examples:
        >>> import torch
        >>> distillation_loss(torch.zeros(2), torch.tensor([0.0, 1.0]), "forward_kl")
        tensor(0.1109)
    """
    policies = _checked_log_policies(student_logits, teacher_logits, divergence, beta, tokens, top_k, temperature)
    student, teacher, _, beta = policies
    if divergence == "sampled_token":
        assert tokens is not None
        student_token, teacher_token = (
            log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for log_probabilities in (student, teacher)
        )
        outside = student_token == -math.inf
        advantage = (teacher_token - student_token).detach().masked_fill(outside, 0)
        loss = -advantage * student_token.masked_fill(outside, 0)
    elif beta == 1.0:
        loss = _kl_divergence(student, teacher)
    elif beta == 0.0:
        loss = _kl_divergence(teacher, student)
    else:
        mixture = _log_mixture(student, teacher, beta)
        loss = beta * _kl_divergence(teacher, mixture) + (1 - beta) * _kl_divergence(student, mixture)
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

    Where the teacher's logits equal the student's, or differ from them by a constant, up to the rounding of their
    dtype, the direction is exactly zero, and the alignment of such a teacher is undefined.

    Arguments, errors and the meaning of ``top_k`` are those of :func:`distillation_loss`.

    Returns:
        ``(..., V)``, dtype of ``student_logits``, in nats per unit of logit.

    Examples:
        >>> import torch
        >>> distillation_logit_gradient(torch.zeros(2), torch.tensor([0.0, 1.0]), "forward_kl")
        tensor([-0.2311,  0.2311])
    """
    policies = _checked_log_policies(student_logits, teacher_logits, divergence, beta, tokens, top_k, temperature)
    probabilities = policies.student.exp()
    # Outside the support both log-probabilities are -inf, and their difference is undefined; 0 adds nothing to a sum.
    log_ratio = torch.where(probabilities > 0, policies.teacher - policies.student, 0)
    if divergence == "sampled_token":
        assert tokens is not None
        direction = _sampled_token_direction(probabilities, log_ratio, tokens.unsqueeze(-1))
    elif policies.beta == 0.0:
        direction = policies.teacher.exp() - probabilities
    else:
        values = log_ratio if policies.beta == 1.0 else _jsd_token_values(log_ratio, policies.beta)
        mean_value = torch.where(probabilities > 0, probabilities * values, 0).sum(dim=-1, keepdim=True)
        direction = probabilities * (values - mean_value)
    direction = torch.where(policies.equal, 0, direction)
    return (direction / temperature).to(student_logits.dtype)


def node_predictors(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    r"""Cheap predictors of alignment: divergences, cosine and entropies of student and teacher.

    Args:
        student_logits: ``(..., V)``, any floating dtype.
        teacher_logits: ``(..., V)``, any floating dtype.
        temperature: Divides both models' logits.

    Returns:
        ``forward_kl`` :math:`KL(q\|p)`, ``reverse_kl`` :math:`KL(p\|q)`, ``js`` (the symmetric Jensen-Shannon
        divergence), ``cosine`` of :math:`p` and :math:`q`, ``student_entropy`` and ``teacher_entropy``. Each is
        ``(...)`` and at least float32; divergences and entropies are in nats.

    Examples:
        >>> import torch
        >>> node_predictors(torch.zeros(4), torch.zeros(4))["student_entropy"]
        tensor(1.3863)
    """
    log_p, log_q, _, _ = _checked_log_policies(
        student_logits, teacher_logits, "reverse_kl", None, None, None, temperature
    )
    mixture = _log_mixture(log_p, log_q, 0.5)
    p, q = log_p.exp(), log_q.exp()
    return {
        "forward_kl": _kl_divergence(log_q, log_p),
        "reverse_kl": _kl_divergence(log_p, log_q),
        "js": (_kl_divergence(log_p, mixture) + _kl_divergence(log_q, mixture)) / 2,
        "cosine": F.cosine_similarity(p, q, dim=-1),
        "student_entropy": -torch.special.xlogy(p, p).sum(-1),
        "teacher_entropy": -torch.special.xlogy(q, q).sum(-1),
    }


def _sampled_token_direction(probabilities: Tensor, log_ratio: Tensor, tokens: Tensor) -> Tensor:
    """``log_ratio_y (1[k = y] - p_k)`` for the sampled tokens ``y``, ``(..., 1)``; 0 where ``y`` has probability 0."""
    inside = probabilities.gather(-1, tokens) > 0
    one_hot = torch.zeros_like(probabilities).scatter(-1, tokens, 1.0)
    return torch.where(inside, log_ratio.gather(-1, tokens) * (one_hot - probabilities), 0)


def _jsd_token_values(log_ratio: Tensor, beta: float) -> Tensor:
    """``(1 - beta) ln(beta e^log_ratio + 1 - beta)``, beta in (0, 1)."""
    # log1p(beta * expm1(ratio)) is exact near ratio = 0. For large ratios expm1 overflows and logaddexp does not.
    for_small = torch.log1p(beta * torch.expm1(log_ratio.clamp(max=1.0)))
    for_large = torch.logaddexp(log_ratio + math.log(beta), torch.full_like(log_ratio, math.log1p(-beta)))
    return (1 - beta) * torch.where(log_ratio < 1.0, for_small, for_large)


def _kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` from log-probabilities ``(..., V)``; tokens with ``p = 0`` contribute nothing."""
    inside = log_p > -math.inf
    # Masked before the product, because 0 * inf is NaN and so is its gradient.
    difference = torch.where(inside, log_p, 0) - torch.where(inside, log_q, 0)
    return (log_p.exp() * difference).sum(dim=-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """``ln(beta q + (1 - beta) p)``, beta in (0, 1); -inf where both are zero."""
    both_zero = torch.isneginf(log_p) & torch.isneginf(log_q)
    # Filled before logaddexp, because the gradient of logaddexp(-inf, -inf) is NaN.
    log_p, log_q = log_p.masked_fill(both_zero, 0), log_q.masked_fill(both_zero, 0)
    mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return mixture.masked_fill(both_zero, -math.inf)


def _checked_log_policies(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str,
    beta: float | None,
    tokens: Tensor | None,
    top_k: int | None,
    temperature: float,
) -> LogPolicies:
    """Check the arguments of a loss, and normalise both models' logits on its support."""
    _check_arguments(student_logits, teacher_logits, divergence, beta, tokens, top_k, temperature)
    effective_beta = {"forward_kl": 0.0, "jsd": 0.5 if beta is None else float(beta)}.get(divergence, 1.0)
    return log_policies(student_logits, teacher_logits, effective_beta, top_k, temperature)


def _check_arguments(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str,
    beta: float | None,
    tokens: Tensor | None,
    top_k: int | None,
    temperature: float,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the arguments of a loss fit each other."""
    check_logits(student_logits, teacher_logits, temperature)
    check_divergence(divergence, beta, top_k)
    if divergence == "sampled_token" and tokens is None:
        raise ValueError("divergence 'sampled_token' needs `tokens`, but none were given.")
    if divergence != "sampled_token" and tokens is not None:
        raise ValueError(f"`tokens` belongs to divergence 'sampled_token', but `divergence` is {divergence!r}.")
    if tokens is not None and tokens.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"`tokens` must have shape {tuple(student_logits.shape[:-1])}, but {tuple(tokens.shape)} was given."
        )


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
