r"""The score of a node: two gradients on the logits of the visited tokens, and their cosine.

:math:`S_u` is the set of tokens that were visited often enough at node :math:`u`. Both policies are renormalised over
it by default. With two tokens both gradients are then multiples of :math:`(1, -1)`, so that the cosine is a sign.
"""

import numpy as np

from odp_callbacks.records import Floats

EQUAL_LOG_RATIO = 1e-5
"""Log-probability ratios that differ by less, in nats, are equal up to the rounding of float32 logits."""


def renormalised(log_probabilities: Floats) -> Floats:
    """Log-probabilities of the distribution that is restricted to the given tokens.

    Args:
        log_probabilities: ``(..., A)``, in nats.

    Examples:
        >>> np.exp(renormalised(np.log([0.1, 0.3]))).round(2).tolist()
        [0.25, 0.75]
    """
    largest = log_probabilities.max(axis=-1, keepdims=True)
    total = np.log(np.exp(log_probabilities - largest).sum(axis=-1, keepdims=True)) + largest
    restricted: Floats = log_probabilities - total
    return restricted


def ideal_gradient(student: Floats, success: Floats) -> Floats:
    r"""The paper's ideal gradient on the logits of :math:`S_u` (eq. 2.3).

    .. math:: P_j \Big( P_j^{succ} - \sum_{k \in S_u} P_k P_k^{succ} \Big)

    Source: arXiv:2605.10889, eq. 2.3.

    Args:
        student: ``(A,)``, the student's probabilities of the tokens of :math:`S_u`.
        success: ``(A,)``, their success rates.

    Returns:
        ``(A,)``, in success probability per unit of logit.

    Examples:
        >>> ideal_gradient(np.array([0.5, 0.5]), np.array([1.0, 0.0])).tolist()
        [0.25, -0.25]
    """
    # Measured from the first token's success, so that equal rates give exact zeros.
    relative = success - success[0]
    gradient: Floats = student * (relative - student @ relative)
    return gradient


def gkd_gradient(student: Floats, log_ratio: Floats) -> Floats:
    r"""The paper's distillation gradient "GKD" on the logits of :math:`S_u`.

    .. math:: -P_j (\ell_j - \bar\ell), \qquad \ell = \ln P_{student} - \ln P_{teacher},
        \qquad \bar\ell = \sum_{k \in S_u} P_k \ell_k

    It is the descent direction of KL(student‖teacher). The paper calls that "forward KL"; everybody else calls it
    *reverse* KL. Source: arXiv:2605.10889.

    Args:
        student: ``(A,)``, the student's probabilities of the tokens of :math:`S_u`.
        log_ratio: ``(..., A)``, :math:`\ell` in nats.

    Returns:
        ``(..., A)``, in nats per unit of logit. Exact zeros where all ratios agree up to rounding.

    Examples:
        >>> gkd_gradient(np.array([0.5, 0.5]), np.array([1.0, -1.0])).tolist()
        [-0.5, 0.5]
    """
    mean = (log_ratio * student).sum(axis=-1, keepdims=True)
    equal = np.ptp(log_ratio, axis=-1, keepdims=True) < EQUAL_LOG_RATIO
    gradient: Floats = np.where(equal, 0.0, -student * (log_ratio - mean))
    return gradient


def logit_cosine(ideal: Floats, distillation: Floats) -> Floats:
    r"""The paper's score of a node: the cosine of the two gradients over :math:`S_u` (eq. 2.12).

    Args:
        ideal: ``(A,)``.
        distillation: ``(..., A)``.

    Returns:
        ``(...)``, in [-1, 1]; NaN where a gradient is zero.

    Examples:
        >>> logit_cosine(np.array([0.25, -0.25]), np.array([[-0.5, 0.5], [0.0, 0.0]])).round(6).tolist()
        [-1.0, nan]
    """
    norms = np.linalg.norm(ideal) * np.linalg.norm(distillation, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine: Floats = np.clip(distillation @ ideal / norms, -1.0, 1.0)
    return cosine


def teacher_advantage(student: Floats, teacher: Floats, success: Floats) -> Floats:
    r"""The paper's teacher advantage (eq. 2.1): success gained by taking the teacher's next token.

    .. math:: \sum_{k \in S_u} (P_k^{te} - P_k)\, \hat P_k^{succ}

    Both policies are renormalised over :math:`S_u` first. (The teacher advantage of a node record is ours: it counts
    the tail of the vocabulary as one token.) Source: arXiv:2605.10889, eq. 2.1.

    Args:
        student: ``(A,)``, probabilities of the tokens of :math:`S_u`; they need not sum to 1.
        teacher: ``(..., A)``, those of the teacher.
        success: ``(A,)``, success rates.

    Returns:
        ``(...)``, in [-1, 1].

    Examples:
        >>> round(float(teacher_advantage(np.array([0.5, 0.5]), np.array([0.75, 0.25]), np.array([1.0, 0.0]))), 3)
        0.25
    """
    student_policy = student / student.sum()
    teacher_policy = teacher / teacher.sum(axis=-1, keepdims=True)
    advantage: Floats = (teacher_policy - student_policy) @ success
    return advantage
