"""A preconditioner: a geometry of the LoRA parameters with a non-negative weight for each of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odp_callbacks.functional.gradients import lora_parameters


@dataclass(frozen=True)
class Preconditioner:
    r"""A diagonal preconditioner :math:`D`; the inner product of gradients becomes :math:`\langle g, D d \rangle`.

    An optimizer with this preconditioner takes a step along :math:`D d`, which changes success by
    :math:`\langle g, D d \rangle` to first order. The length of the step is :math:`\sqrt{\langle d, D d \rangle}`,
    measured with :math:`D^{-1}`. Both are Euclidean for gradients that are multiplied by :math:`\sqrt{D}`, so every
    figure can be computed from the Gram matrices of these.

    Attributes:
        name: Its name in figures and records.
        weights: The diagonal of :math:`D` by parameter name, of each parameter's shape. Weights are non-negative; a
            parameter with weight 0 does not count.
    """

    name: str
    weights: Mapping[str, Tensor]

    def square_roots(self, student: nn.Module) -> dict[str, Tensor]:
        """Square roots of the weights, in float32 on the student's device, in the order of its LoRA parameters.

        Args:
            student: The student.

        Returns:
            The square roots by parameter name.

        Raises:
            ValueError: If the weights are not those of this student's LoRA parameters, or not finite and non-negative.
        """
        parameters = lora_parameters(student)
        if unmatched := sorted(parameters.keys() ^ self.weights.keys()):
            raise ValueError(
                f"`preconditioner` must have a weight for each of the student's {len(parameters)} LoRA parameters and "
                f"no others, but {unmatched[0]!r} is in only one of the two."
            )
        square_roots = {}
        for name, parameter in parameters.items():
            weight = self.weights[name]
            if weight.shape != parameter.shape or not bool((weight.isfinite() & (weight >= 0)).all()):
                raise ValueError(
                    f"`preconditioner` must be finite, non-negative and of shape {tuple(parameter.shape)} for {name}, "
                    f"but its shape is {tuple(weight.shape)} and its numbers reach from {float(weight.min())} to "
                    f"{float(weight.max())}."
                )
            square_roots[name] = weight.to(parameter.device, torch.float64).sqrt().float()
        return square_roots
