"""Gradients of groups of questions, summed from batch to batch: the only thing that grows with the LoRA parameters."""

from copy import copy

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.engine.update.row_sketch import RowSketch
from odp_callbacks.records import Floats
from odp_callbacks.update_records import CLASSES, UpdateGram, gram_of_rows

BLOCK = 2**16
"""Columns whose inner products are summed in double precision at a time."""


class UpdateRows:
    """Sums of success gradients and distillation gradients, on the CPU.

    Args:
        groups: ``F`` groups of questions.
        teachers: ``K`` teachers.
        sketch: Of the ``P`` LoRA parameters; the rows have its ``M`` columns.

    Attributes:
        success: ``(F, M)`` float32, the success gradient of each group.
        directions: ``(F, K, C, M)`` float32, the distillation gradient of each group, teacher and class.
        tokens: ``(F, C)``, response tokens of each group and class.
    """

    def __init__(self, groups: int, teachers: int, sketch: RowSketch) -> None:
        width = sum(sketch.widths)
        self.sketch = sketch
        self.success = torch.zeros(groups, width, dtype=torch.float32)
        self.directions = torch.zeros(groups, teachers, len(CLASSES), width, dtype=torch.float32)
        self.tokens: Floats = np.zeros((groups, len(CLASSES)))

    def add(self, group: int, kind: int, rows: Tensor, tokens: int) -> None:
        """Add the gradients of some rollouts.

        Args:
            group: Their group.
            kind: Their class, as an index into :data:`~odp_callbacks.update_records.CLASSES`.
            rows: ``(1 + K, P)`` float32 on the CPU, success and the teachers.
            tokens: Their response tokens.
        """
        rows = self.sketch(rows)
        self.success[group] += rows[0]
        self.directions[group, :, kind] += rows[1:]
        self.tokens[group, kind] += tokens

    def first(self, groups: int) -> "UpdateRows":
        """The sums of the first groups alone."""
        part = copy(self)
        part.success, part.directions = self.success[:groups], self.directions[:groups]
        part.tokens = self.tokens[:groups]
        return part

    def gram(self, questions: Floats) -> UpdateGram:
        """Inner products of the rows.

        Args:
            questions: ``(F,)``, questions of each group.
        """
        parts = [
            gram_of_rows(questions, self.tokens, success.double().numpy(), directions.double().numpy())
            for success, directions in zip(
                self.success.split(BLOCK, dim=-1), self.directions.split(BLOCK, dim=-1), strict=True
            )
        ]
        success, cross, of_teacher, between = (
            np.sum([getattr(part, name) for part in parts], axis=0)
            for name in ("success", "cross", "directions", "between")
        )
        return UpdateGram(np.asarray(questions, float), self.tokens, success, cross, of_teacher, between)
