"""Products of rows on the device where they are, against those on the CPU, and where they are kept."""

import numpy as np
import pytest
import torch

from odp_callbacks.engine.update import update_rows
from odp_callbacks.engine.update.gradient_sums import device_of_sums
from odp_callbacks.engine.update.row_sketch import RowSketch
from odp_callbacks.engine.update.update_rows import UpdateRows, products_in_blocks
from odp_callbacks.update_records import gram_of_products


@pytest.mark.parametrize("numbers", [1, 100, 10**6])
def test_products_in_blocks_are_those_on_the_cpu(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_rows, "BLOCK", 7)
    rows = UpdateRows(3, 2, RowSketch([10, 21], 1.0))
    generator = torch.Generator().manual_seed(0)
    for group in range(3):
        for kind in range(2):
            rows.add(group, kind, torch.randn(3, 31, generator=generator), 1 + group)
    expected = rows.gram(np.ones(3))
    products = products_in_blocks(rows.success, rows.directions.flatten(0, 2), numbers)
    found = gram_of_products(np.ones(3), rows.tokens, *products, 2)
    for name in ("tokens", "success", "cross", "directions", "between"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_sums_are_beside_the_student_only_where_they_fit() -> None:
    elsewhere = torch.device("meta")  # any device but the CPU
    assert device_of_sums(elsewhere, 1000) == elsewhere
    assert device_of_sums(elsewhere, 1000, max_memory_bytes=16_000) == elsewhere
    assert device_of_sums(elsewhere, 1000, max_memory_bytes=15_999) == torch.device("cpu")
