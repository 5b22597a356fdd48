"""Gradient alignment: the cosine of two gradients, or NaN where it is undefined."""

import torch
from torch import Tensor

from odp_callbacks.functional.working_precision import check_floating_point, working_dtype


def gradient_alignment(a: Tensor, b: Tensor) -> Tensor:
    r"""Cosine of two gradients over the last dimension.

    .. math:: a(u) = \frac{\langle a, b \rangle}{\|a\| \, \|b\|}

    The cosine is undefined (NaN) where either gradient is zero or not finite. Each gradient is first divided by its
    largest component, so that very small and very large gradients neither underflow nor overflow.
    :func:`ideal_logit_gradient` and :func:`distillation_logit_gradient` return exact zeros where a gradient vanishes
    up to rounding, so that its alignment is NaN rather than noise.

    On the logits of a node this is the score of arXiv:2605.10889 (eq. 2.12). On the LoRA parameters the score is ours.

    Args:
        a: ``(..., P)``, any floating dtype.
        b: ``(..., P)``, any floating dtype; the leading dimensions broadcast with those of ``a``.

    Returns:
        ``(...)``, in [-1, 1] or NaN, in the wider dtype of the two.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the last dimensions differ.

    Examples:
        >>> import torch
        >>> gradient_alignment(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        tensor([1., nan])
    """
    check_floating_point("a", a)
    check_floating_point("b", b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"`a` and `b` must agree in their last dimension, but {a.shape[-1]} and {b.shape[-1]} do not.")
    computing_dtype = working_dtype(a, b)
    unit_a, unit_b = _unit_vectors(a.to(computing_dtype)), _unit_vectors(b.to(computing_dtype))
    # The clamp removes the rounding error of a cosine of 1. It keeps NaN.
    return (unit_a * unit_b).sum(dim=-1).clamp(-1.0, 1.0).to(torch.promote_types(a.dtype, b.dtype))


def _unit_vectors(vectors: Tensor) -> Tensor:
    """Divide by the norm over the last dimension; NaN where a vector is zero or not finite."""
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    defined = (largest > 0) & torch.isfinite(largest)
    scaled = vectors / torch.where(defined, largest, torch.nan)
    norms: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / norms
