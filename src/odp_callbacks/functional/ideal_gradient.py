"""The ideal gradient: the ascent direction of the student's success probability on its logits."""

import torch
from torch import Tensor

from odp_callbacks.functional.working_precision import check_floating_point, check_temperature, working_dtype


def ideal_logit_gradient(student_logits: Tensor, success: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Ascent direction of the student's success probability on its own logits.

    With :math:`p = \mathrm{softmax}(z/\tau)` and :math:`V = \sum_k p_k Q_k`, where every :math:`Q_k` is held constant,

    .. math:: g^*_k = \frac{1}{\tau}\, p_k\, (Q_k - V).

    If every token has the same success, the result is exactly zero in any dtype. For this, success is measured
    relative to that of the most probable token, so that a common constant cancels before it is rounded.

    Source: arXiv:2605.10889 (eq. 2.3).

    Args:
        student_logits: ``(..., V)``, any floating dtype; not yet divided by the temperature.
        success: ``(..., V)``, any floating dtype; ``success[..., k]`` is :math:`Q_k`, the expected reward when token
            ``k`` is taken. Leading dimensions broadcast with those of ``student_logits``.
        temperature: Sampling temperature :math:`\tau` of the student.

    Returns:
        ``(..., V)``, dtype of ``student_logits``, in success probability per unit of logit.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the last dimensions differ or ``temperature`` is not positive.

    Examples:
        >>> import torch
        >>> ideal_logit_gradient(torch.zeros(2), torch.tensor([1.0, 0.0]))
        tensor([ 0.2500, -0.2500])
    """
    check_floating_point("student_logits", student_logits)
    check_floating_point("success", success)
    check_temperature(temperature)
    if student_logits.shape[-1] != success.shape[-1]:
        raise ValueError(
            f"`success` must have one value for each of the {student_logits.shape[-1]} tokens of `student_logits`, "
            f"but its shape is {tuple(success.shape)}."
        )
    dtype = working_dtype(student_logits, success)
    shape = torch.broadcast_shapes(student_logits.shape, success.shape)
    logits, values = student_logits.to(dtype).expand(shape), success.to(dtype).expand(shape)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    values = values - values.gather(-1, logits.argmax(dim=-1, keepdim=True))
    node_value = (probabilities * values).sum(dim=-1, keepdim=True)
    gradient: Tensor = probabilities * (values - node_value) / temperature
    return gradient.to(student_logits.dtype)
