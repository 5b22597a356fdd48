"""Sums over all batches of the gradients of an update, and where they are kept."""

from collections.abc import Mapping

import torch
from torch import Tensor

from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.update.module_products import with_module_products
from odp_callbacks.engine.update.row_sketch import RowSketch
from odp_callbacks.engine.update.update_rows import UpdateRows
from odp_callbacks.records import Floats
from odp_callbacks.update_records import UpdateGram

SHARE_ON_DEVICE = 0.25
"""Share of the memory for a stage that the sums may take on the student's device."""


class GradientSums:
    """Gradients by group and class, in one or two geometries; of success by fold; and of each teacher over all.

    Args:
        groups: ``F`` groups of questions.
        folds: Folds of questions.
        teachers: ``K`` teachers.
        parameters: The LoRA parameters by name, ``P`` numbers together.
        sketch: Of these parameters.
        square_roots: Of a preconditioner, for each parameter; None for the Euclidean geometry alone.
        device: Where the sums are kept.

    Attributes:
        device: Where the sums are kept.
        rows: By group and class.
        directions: ``(K, P)`` float32, the distillation gradient of each teacher.
        success: ``(folds, P)`` float32, the success gradient of each fold.
    """

    def __init__(
        self,
        groups: int,
        folds: int,
        teachers: int,
        parameters: Mapping[str, Tensor],
        sketch: RowSketch,
        square_roots: Mapping[str, Tensor] | None,
        device: torch.device,
    ) -> None:
        size = sum(p.numel() for p in parameters.values())
        self.device = device
        self._columns = dict(zip(parameters, sketch.widths, strict=True))
        self._scale: Tensor | None = None
        self._scaled: UpdateRows | None = None
        if square_roots is not None:
            self._scale = torch.cat([square_roots[name].flatten().to(device) for name in parameters])
            self._scaled = UpdateRows(groups, teachers, sketch, device)
        self.rows = UpdateRows(groups, teachers, sketch, device)
        self.directions = torch.zeros(teachers, size, device=device)
        self.success = torch.zeros(folds, size, device=device)

    def add(self, group: int, kind: int, fold: int, rows: Tensor, tokens: int) -> None:
        """Add the gradients of some rollouts.

        Args:
            group: Their group.
            kind: Their class, as an index into :data:`~odp_callbacks.update_records.CLASSES`.
            fold: Their fold.
            rows: ``(1 + K, P)`` floating, success and the teachers.
            tokens: Their response tokens.
        """
        rows = rows.float().to(self.device)
        self.rows.add(group, kind, rows, tokens)
        if self._scaled is not None and self._scale is not None:
            self._scaled.add(group, kind, rows * self._scale, tokens)
        self.directions += rows[1:]
        self.success[fold] += rows[0]

    def grams(self, questions: Floats) -> tuple[UpdateGram, UpdateGram | None]:
        """Inner products in the Euclidean and in the other geometry, also by module.

        Args:
            questions: ``(F',)``, questions of each of the first groups; the other groups are left out.
        """
        geometries = [self.rows.first(len(questions))]
        if self._scaled is not None:
            geometries.append(self._scaled.first(len(questions)))
        euclidean, *others = [
            with_module_products(rows.gram(questions), rows.success, rows.directions, self._columns)
            for rows in geometries
        ]
        return euclidean, others[0] if others else None


def device_of_sums(student: torch.device, numbers: int, max_memory_bytes: float | None = None) -> torch.device:
    """Where sums of gradients are kept: beside the student if they fit there and can be multiplied in float64.

    On an accelerator their products take a fraction of the time that moving them to the CPU takes.

    Args:
        student: The student's device.
        numbers: How many numbers in float32 the sums have.
        max_memory_bytes: Limit for a stage in bytes; None for half of what is free.

    Examples:
        >>> device_of_sums(torch.device("cpu"), 10)
        device(type='cpu')
    """
    if student.type == "cpu" or 4 * numbers > SHARE_ON_DEVICE * free_bytes(student, max_memory_bytes):
        return torch.device("cpu")
    try:
        torch.zeros(1, dtype=torch.float64, device=student)
    except (RuntimeError, TypeError):  # Apple's GPUs and some of Intel's have no float64
        return torch.device("cpu")
    return student
