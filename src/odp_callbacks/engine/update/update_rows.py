"""Gradients of groups of questions, summed from batch to batch: the only thing that grows with the LoRA parameters."""

from copy import copy

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.engine.update.row_sketch import RowSketch
from odp_callbacks.records import Floats
from odp_callbacks.update_records import CLASSES, UpdateGram, gram_of_products, gram_of_rows

CPU = torch.device("cpu")
BLOCK = 2**16
"""Columns whose inner products are summed in double precision at a time on a CPU."""
BLOCK_NUMBERS_ELSEWHERE = 2**24
"""Numbers that are in double precision at a time on another device."""


class UpdateRows:
    """Sums of success gradients and distillation gradients.

    Args:
        groups: ``F`` groups of questions.
        teachers: ``K`` teachers.
        sketch: Of the ``P`` LoRA parameters; the rows have its ``M`` columns.
        device: Where the rows are kept; a sketch is made on the CPU.

    Attributes:
        success: ``(F, M)`` float32, the success gradient of each group.
        directions: ``(F, K, C, M)`` float32, the distillation gradient of each group, teacher and class.
        tokens: ``(F, C)``, response tokens of each group and class.
    """

    def __init__(self, groups: int, teachers: int, sketch: RowSketch, device: torch.device = CPU) -> None:
        width = sum(sketch.widths)
        self.sketch = sketch
        self.success = torch.zeros(groups, width, device=device)
        self.directions = torch.zeros(groups, teachers, len(CLASSES), width, device=device)
        self.tokens: Floats = np.zeros((groups, len(CLASSES)))

    def add(self, group: int, kind: int, rows: Tensor, tokens: int) -> None:
        """Add the gradients of some rollouts.

        Args:
            group: Their group.
            kind: Their class, as an index into :data:`~odp_callbacks.update_records.CLASSES`.
            rows: ``(1 + K, P)`` float32 on the device of the rows, success and the teachers.
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
        if self.success.device.type != "cpu":
            products = products_in_blocks(self.success, self.directions.flatten(0, 2), BLOCK_NUMBERS_ELSEWHERE)
            return gram_of_products(questions, self.tokens, *products, self.directions.shape[1])
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


def products_in_blocks(success: Tensor, directions: Tensor, numbers: int) -> tuple[Floats, Floats, Floats]:
    """Inner products of rows where they are, some columns at a time in float64; only the products are moved.

    Args:
        success: ``(F, M)``.
        directions: ``(D, M)``.
        numbers: Numbers in float64 at a time, at most; a single column may have more.

    Returns:
        ``(F, F)``, ``(F, D)`` and ``(D, D)``, each float64.

    Examples:
        >>> products = products_in_blocks(torch.ones(1, 5), torch.arange(10.0).view(2, 5), numbers=6)
        >>> [part.tolist() for part in products]
        [[[5.0]], [[10.0, 35.0]], [[30.0, 80.0], [80.0, 255.0]]]
    """
    rows, groups = len(success) + len(directions), len(success)
    products = torch.zeros(rows, rows, dtype=torch.float64, device=success.device)
    width = max(1, numbers // rows)
    for of_success, of_directions in zip(success.split(width, dim=1), directions.split(width, dim=1), strict=True):
        block = torch.cat([of_success, of_directions]).double()
        products += block @ block.mT
    moved: Floats = products.cpu().numpy()
    return moved[:groups, :groups], moved[:groups, groups:], moved[groups:, groups:]
