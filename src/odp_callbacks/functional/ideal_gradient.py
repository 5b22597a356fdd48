"""The ideal gradient: the direction on the student's logits that raises success fastest."""

import torch
from torch import Tensor

from odp_callbacks.functional.working_precision import floating, positive_temperature, working


def ideal_logit_gradient(student_logits: Tensor, success: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Ascent direction of the student's success probability on its own logits.

    With :math:`p = \mathrm{softmax}(z/\tau)` and :math:`V = \sum_k p_k Q_k`,

    .. math:: g^*_k = \frac{1}{\tau}\, p_k\, (Q_k - V).

    Every :math:`Q_k` is held constant. A success that is the same for every token gives exact zeros, in any dtype:
    it is measured relative to the most probable token's, so that a common constant cancels before it is rounded.

    Source: arXiv:2605.10889 (softmax Jacobian).

    Args:
        student_logits: ``(..., V)``, any floating dtype; not yet divided by the temperature.
        success: ``(..., V)``, ``success[..., k]`` is :math:`Q_k`, the expected reward when token ``k`` is taken.
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
    floating("student_logits", student_logits)
    floating("success", success)
    positive_temperature(temperature)
    if student_logits.shape[-1] != success.shape[-1]:
        raise ValueError(
            f"`success` must have one value for each of the {student_logits.shape[-1]} tokens of `student_logits`, "
            f"but its shape is {tuple(success.shape)}."
        )
    dtype = working(student_logits, success)
    shape = torch.broadcast_shapes(student_logits.shape, success.shape)
    z, q = student_logits.to(dtype).expand(shape), success.to(dtype).expand(shape)
    p = torch.softmax(z / temperature, dim=-1)
    q = q - q.gather(-1, z.argmax(dim=-1, keepdim=True))
    value = (p * q).sum(dim=-1, keepdim=True)
    gradient: Tensor = p * (q - value) / temperature
    return gradient.to(student_logits.dtype)
