"""Checks of tensor arguments, and the dtype that the pure functions compute in.

Half-precision inputs are computed in float32, and the result is returned in the dtype of the input.
"""

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype to compute in: the widest dtype of the given tensors, and at least float32.

    Args:
        *tensors: At least one tensor, of any shape and dtype.

    Returns:
        The dtype.

    Examples:
        >>> working_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.promote_types(dtype, torch.float32)


def check_floating_point(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a floating-point tensor with at least one dimension."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() == 0:
        given = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor of shape (..., V), but {given} was given.")


def check_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless both models' logits and the temperature fit each other."""
    check_floating_point("student_logits", student_logits)
    check_floating_point("teacher_logits", teacher_logits)
    check_temperature(temperature)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`teacher_logits` must have the shape of `student_logits`, "
            f"but {tuple(teacher_logits.shape)} and {tuple(student_logits.shape)} were given."
        )


def check_temperature(temperature: float) -> None:
    """Raise ``ValueError`` unless ``temperature`` is a positive finite number."""
    if not (0 < temperature < float("inf")):
        raise ValueError(f"`temperature` must be a positive number, but {temperature!r} was given.")
