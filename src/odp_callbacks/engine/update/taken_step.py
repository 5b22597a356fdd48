"""The step that an optimizer has taken: the LoRA parameters before it, and its cosine with teachers' gradients."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odp_callbacks.functional.gradients import lora_parameters


@dataclass(frozen=True)
class KeptParameters:
    """A copy of a student's LoRA parameters.

    Attributes:
        values: By name, on the device and in the dtype of the student.
        step: Number of optimizer steps that the student had taken.
    """

    values: Mapping[str, Tensor]
    step: int

    @classmethod
    def of(cls, student: nn.Module, step: int) -> "KeptParameters":
        """Copy the parameters as they are now."""
        return cls({name: value.detach().clone() for name, value in lora_parameters(student).items()}, step)

    def fits(self, other: "KeptParameters") -> bool:
        """Whether the other copy is of the same parameters: adapters may have been switched or replaced."""
        return [(name, value.shape, value.device) for name, value in self.values.items()] == [
            (name, value.shape, value.device) for name, value in other.values.items()
        ]


def step_cosines(before: KeptParameters, after: KeptParameters, directions: Mapping[str, Tensor]) -> dict[str, float]:
    """Cosine of a step with each teacher's summed distillation gradient.

    Args:
        before: The parameters before the step.
        after: After it.
        directions: For each teacher ``(P,)``, its descent direction, on the CPU.

    Returns:
        By teacher; a teacher whose gradient is zero or of other parameters is left out, and all are if the step is
        zero.

    Examples:
        >>> import torch
        >>> before = KeptParameters({"a": torch.tensor([0.0, 0.0])}, 0)
        >>> after = KeptParameters({"a": torch.tensor([3.0, 4.0])}, 1)
        >>> step_cosines(before, after, {"base": torch.tensor([1.0, 0.0]), "equal": torch.zeros(2)})
        {'base': 0.6}
    """
    moved = [(after.values[name].float() - value.float()).flatten() for name, value in before.values.items()]
    step = torch.cat(moved).cpu()
    length = float(step.norm())
    cosines = {}
    for teacher, direction in directions.items():
        size = float(direction.norm()) if direction.shape == step.shape else 0.0
        if length > 0 and size > 0:
            cosines[teacher] = float(torch.dot(step, direction.to(step))) / length / size
    return cosines
