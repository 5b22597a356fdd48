"""The gradient alignment score: the cosine of two gradients, or NaN where there is none."""

import torch
from torch import Tensor

from odp_callbacks.functional.working_precision import floating, working


def gradient_alignment(a: Tensor, b: Tensor) -> Tensor:
    r"""Cosine of two gradients over the last dimension.

    .. math:: a(u) = \frac{\langle a, b \rangle}{\|a\| \, \|b\|}

    Scaled by the largest component first, so that neither tiny nor huge gradients lose it to underflow. Undefined
    (NaN) where either gradient is zero or not finite. :func:`ideal_logit_gradient` and
    :func:`distillation_logit_gradient` return exact zeros for what is zero only up to rounding.

    Source: arXiv:2605.10889 (gradient alignment score).

    Args:
        a: ``(..., P)``, any floating dtype.
        b: ``(..., P)``; the leading dimensions broadcast.

    Returns:
        ``(...)``, in [-1, 1] or NaN; the wider dtype of the two.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the last dimensions differ.

    Examples:
        >>> import torch
        >>> gradient_alignment(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        tensor([1., nan])
    """
    floating("a", a)
    floating("b", b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"`a` and `b` must agree in their last dimension, but {a.shape[-1]} and {b.shape[-1]} do not.")
    dtype = working(a, b)
    unit_a, unit_b = _unit(a.to(dtype)), _unit(b.to(dtype))
    # clamp only takes off the rounding of a cosine of 1; it passes NaN through.
    return (unit_a * unit_b).sum(dim=-1).clamp(-1.0, 1.0).to(torch.promote_types(a.dtype, b.dtype))


def _unit(x: Tensor) -> Tensor:
    """``x / ‖x‖`` over the last dimension, NaN where ``x`` is zero or not finite."""
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    defined = (largest > 0) & torch.isfinite(largest)
    scaled = x / torch.where(defined, largest, torch.nan)
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / norm
