r"""Fewer columns for gradients on very many LoRA parameters, with inner products that are right on average.

A count sketch (Charikar, Chen and Farach-Colton, 2002) adds every parameter, with a random sign, to one of ``m``
columns. The inner product of two sketched rows is unbiased, and its standard error is at most :math:`\sqrt{2/m}` times
the product of their norms.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MINIMUM_COLUMNS = 4096
"""Columns that a LoRA matrix keeps at least, if it has as many parameters."""


class RowSketch:
    """A count sketch of each LoRA matrix on its own, so that products by module are sketched, too.

    Args:
        sizes: Number of parameters of each LoRA matrix.
        share: Columns for each parameter; 1 or more keeps the rows as they are.

    Attributes:
        widths: Columns of each matrix.
        error: Standard error of an inner product relative to the product of the norms, at most; 0 without a sketch.

    Examples:
        >>> import torch
        >>> sketch = RowSketch([50_000, 100], share=0.1)
        >>> sketch.widths, round(sketch.error, 4)
        ([5000, 100], 0.02)
        >>> sketch(torch.ones(3, 50_100)).shape
        torch.Size([3, 5100])
    """

    def __init__(self, sizes: Sequence[int], share: float) -> None:
        self.widths = [min(size, max(MINIMUM_COLUMNS, math.ceil(share * size))) for size in sizes]
        sketched = [width for width, size in zip(self.widths, sizes, strict=True) if width < size]
        self.error = math.sqrt(2 / min(sketched)) if sketched else 0.0
        self._columns: Tensor | None = None
        if not sketched:
            return
        generator = torch.Generator().manual_seed(0)
        columns, signs, first = [], [], 0
        for width, size in zip(self.widths, sizes, strict=True):
            if width == size:
                columns.append(torch.arange(first, first + size, dtype=torch.int32))
                signs.append(torch.ones(size, dtype=torch.int8))
            else:
                columns.append(first + torch.randint(width, (size,), generator=generator, dtype=torch.int32))
                signs.append(2 * torch.randint(2, (size,), generator=generator, dtype=torch.int8) - 1)
            first += width
        self._columns, self._signs = torch.cat(columns), torch.cat(signs)

    def __call__(self, rows: Tensor) -> Tensor:
        """Sketch rows ``(..., P)`` on the CPU to ``(..., M)``, with ``M`` the sum of the widths."""
        if self._columns is None:
            return rows
        sketched = rows.new_zeros(*rows.shape[:-1], sum(self.widths))
        return sketched.index_add_(-1, self._columns, rows * self._signs)
