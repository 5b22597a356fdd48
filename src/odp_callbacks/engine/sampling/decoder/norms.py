"""The root mean square norm of models like Llama, with few operator calls."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odp_callbacks.engine.sampling.exact_arithmetic import HALF_PRECISION


@dataclass(frozen=True)
class RootMeanSquareNorm:
    r"""Computes :math:`w\, x / \sqrt{\frac{1}{E} \sum_i x_i^2 + \epsilon}`.

    Attributes:
        weight: ``w``, ``(E,)``, or ``(n, E)`` for ``n`` heads with weights of their own.
        epsilon: Positive.

    Examples:
        >>> import torch
        >>> norm = RootMeanSquareNorm(torch.ones(2), 1e-6)
        >>> [round(number, 4) for number in norm(torch.tensor([3.0, 4.0])).tolist()]
        [0.8485, 1.1314]
    """

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: nn.Module) -> "RootMeanSquareNorm":
        """Read a norm of transformers.

        Raises:
            NotImplementedError: If it is another norm.
        """
        parts: Any = module
        epsilon = getattr(parts, "variance_epsilon", getattr(parts, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float):
            raise NotImplementedError(f"a norm is a {type(module).__name__}")
        return cls(parts.weight.detach(), epsilon)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Compute the norm.

        Args:
            inputs: ``(…, E)``, or ``(…, n, E)`` where the heads have weights of their own.

        Returns:
            The same shape and dtype.
        """
        if inputs.dtype in HALF_PRECISION or inputs.device.type != "cpu":  # one kernel on an accelerator
            width = inputs.shape[-1:]
            if self.weight.dim() == 1:
                return F.rms_norm(inputs, width, self.weight.to(inputs.dtype), self.epsilon)
            return F.rms_norm(inputs, width, None, self.epsilon).mul_(self.weight)
        # The root mean square is a hypotenuse over the root of the width: three calls in place of nine.
        length = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        return torch.div(inputs, torch.hypot(length, self._offset)).mul_(self._scaled_weight)

    @cached_property
    def _offset(self) -> Tensor:
        return self.weight.new_tensor(math.sqrt(self.weight.shape[-1] * self.epsilon))

    @cached_property
    def _scaled_weight(self) -> Tensor:
        return self.weight * math.sqrt(self.weight.shape[-1])
