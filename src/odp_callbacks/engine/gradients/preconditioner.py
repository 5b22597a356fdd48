"""Another geometry on the LoRA parameters than the Euclidean one: a positive weight for each of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odp_callbacks.functional.gradients import lora_parameters


@dataclass(frozen=True)
class Preconditioner:
    r"""A diagonal metric: the inner product of gradients is :math:`\langle g, D d \rangle`.

    A step along :math:`D d`, as an optimizer with such a preconditioner takes it, changes success by
    :math:`\langle g, D d \rangle`; its length, :math:`\sqrt{\langle d, D d \rangle}`, is that of :math:`D d` in the
    inverse metric. With gradients scaled by :math:`\sqrt{D}` both are Euclidean, and so is all that follows.

    Attributes:
        name: What figures and records call it.
        weights: The diagonal of :math:`D` by parameter name, of each parameter's shape; non-negative, and 0 for a
            parameter that does not count.
    """

    name: str
    weights: Mapping[str, Tensor]

    def roots(self, student: nn.Module) -> dict[str, Tensor]:
        """Roots of the weights, in float32 on the student's device, in the order of its LoRA parameters.

        Raises:
            ValueError: If they are not those of this student's LoRA parameters, or not finite and non-negative.
        """
        parameters = lora_parameters(student)
        if missing := sorted(parameters.keys() ^ self.weights.keys()):
            raise ValueError(
                f"`metric` must have a weight for each of the student's {len(parameters)} LoRA parameters and no "
                f"others, but {missing[0]!r} is in only one of the two."
            )
        found = {}
        for name, p in parameters.items():
            weight = self.weights[name]
            if weight.shape != p.shape or not bool((weight.isfinite() & (weight >= 0)).all()):
                raise ValueError(
                    f"`metric` must be finite, non-negative and of shape {tuple(p.shape)} for {name}, but its shape is "
                    f"{tuple(weight.shape)} and its numbers reach from {float(weight.min())} to {float(weight.max())}."
                )
            found[name] = weight.to(p.device, torch.float64).sqrt().float()
        return found
