"""Gram matrices of a node's gradients: their inner products, for each module with LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class NodeGrams(NamedTuple):
    """Gram matrices of the gradients at the nodes of one sequence.

    Attributes:
        grams: ``(M, C_n, C_n)`` float64 on the CPU for each node: one matrix for each of the ``M`` modules of
            :func:`lora_modules`. Their sum over ``M`` is the Gram matrix on all LoRA parameters.
        preconditioned: The Gram matrices of the preconditioned gradients; empty if not asked for.
    """

    grams: list[Tensor]
    preconditioned: list[Tensor]


@dataclass(frozen=True)
class ScaledDirections:
    """Directions on one node's logits, with the scales that bring their largest components to 1.

    Gradients are computed for the scaled directions and multiplied by the scales in float64 or float32 afterwards, so
    that half precision does not lose small directions.

    Attributes:
        directions: ``(C, V)``, floating.
        scales: ``(C,)`` float64 on the CPU.
        nonzero: ``(C',)`` int64: indices of the directions that are not exactly zero. Zero directions, those of a
            teacher that equals the student, need no backward. A direction with NaN counts as nonzero.
    """

    directions: Tensor
    scales: Tensor
    nonzero: Tensor

    @classmethod
    def of(cls, directions: Tensor) -> "ScaledDirections":
        """Find the scales of ``directions``, ``(C, V)``."""
        if directions.numel():
            scales = directions.abs().amax(dim=-1).double().cpu()
        else:
            scales = directions.new_zeros(len(directions)).double()
        return cls(directions, scales, (scales != 0).nonzero().squeeze(1))

    def scaled(self, index: int | Tensor) -> Tensor:
        """One direction divided by its scale, ``(V,)`` float64."""
        direction: Tensor = self.directions[index]
        return direction.double() / self.scales[index].to(direction.device)

    def gram_matrices(self, gradients: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """Gram matrices of the gradients of all ``C`` directions.

        Args:
            gradients: ``(C', size)`` for each parameter: gradients of the scaled nonzero directions.
            names: Names of the parameters.

        Returns:
            ``(M, C, C)`` float64 on the CPU.
        """
        modules = lora_modules(names)
        return self.unscaled(module_gram_matrices(gradients, names, modules))

    def unscaled(self, of_scaled: Tensor) -> Tensor:
        """Gram matrices of all directions, from those of the scaled nonzero ones.

        Args:
            of_scaled: ``(M, C', C')`` float64 on the CPU.

        Returns:
            ``(M, C, C)`` float64 on the CPU.
        """
        direction_count = len(self.scales)
        gram_matrices = torch.zeros(len(of_scaled), direction_count, direction_count, dtype=torch.float64)
        if len(self.nonzero):
            scales = self.scales[self.nonzero]
            gram_matrices[:, self.nonzero[:, None], self.nonzero] = of_scaled * (scales[:, None] * scales)
        return gram_matrices


def lora_modules(names: Sequence[str]) -> list[str]:
    """The module of each LoRA parameter, in order and without repetition.

    Examples:
        >>> lora_modules(["layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_B.default.weight"])
        ['layers.0.q_proj']
    """
    return list(dict.fromkeys(module_of(name) for name in names))


def module_of(name: str) -> str:
    """The module that a LoRA parameter belongs to, by its name."""
    return name.split(".lora_")[0].removeprefix("base_model.model.")


def module_gram_matrices(gradients: Sequence[Tensor], names: Sequence[str], modules: Sequence[str]) -> Tensor:
    """Gram matrices from the gradients of parameters; zeros for modules that have none of these.

    Args:
        gradients: ``(C, size)`` for each parameter.
        names: Names of the parameters.
        modules: ``M`` names of modules, as of :func:`lora_modules`.

    Returns:
        ``(M, C, C)`` float64 on the CPU.
    """
    direction_count = len(gradients[0]) if gradients else 0
    # Added up where the gradients are: each copy to the CPU would wait for the device.
    device = gradients[0].device if gradients else None
    gram_matrices = torch.zeros(len(modules), direction_count, direction_count, dtype=torch.float64, device=device)
    module_indices = {module: module_index for module_index, module in enumerate(modules)}
    for parameter_name, gradient in zip(names, gradients, strict=True):
        wide_gradient = gradient.double()
        gram_matrices[module_indices[module_of(parameter_name)]] += wide_gradient @ wide_gradient.mT
    return gram_matrices.cpu()
