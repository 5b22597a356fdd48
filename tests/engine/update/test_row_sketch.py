"""Sketched gradients: unbiased products, the stated error, and a measurement that needs them."""

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.update_gain import update_gain
from odp_callbacks.engine.update import row_sketch
from odp_callbacks.engine.update.measurement import UpdateMeter
from odp_callbacks.engine.update.row_sketch import RowSketch
from odp_callbacks.functional import lora_parameters
from tests.engine.update.test_gradient_rows import make_gradients
from tests.engine.update.test_measurement import make_rollouts
from tests.helpers.models import tiny


def test_the_error_is_as_small_as_stated_and_without_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sketch, "MINIMUM_COLUMNS", 64)
    generator = torch.Generator().manual_seed(1)
    sketch = RowSketch([20_000, 10_000], share=0.02)
    assert sketch.error == pytest.approx((2 / 200) ** 0.5)
    first, second = torch.randn(2, 300, 30_000, generator=generator)
    second = first + second
    exact, found = (first * second).sum(1), (sketch(first) * sketch(second)).sum(1)
    errors = ((found - exact) / (first.norm(dim=1) * second.norm(dim=1))).numpy()
    assert errors.std() < sketch.error
    assert abs(errors.mean()) < 5 * errors.std() / 300**0.5


def test_enough_memory_keeps_the_rows_as_they_are() -> None:
    sketch = RowSketch([100, 50_000], share=1.0)
    rows = torch.randn(2, 50_100)
    assert sketch.error == 0
    assert sketch(rows) is rows


def test_a_measurement_in_little_memory_says_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sketch, "MINIMUM_COLUMNS", 48)
    student = tiny(hidden_size=64, head_dim=16)
    gradients, rollouts = make_gradients(student), make_rollouts()
    exact = UpdateMeter(gradients).measure(rollouts)
    size = sum(p.numel() for p in lora_parameters(student).values())
    meter = UpdateMeter(gradients, max_memory_bytes=2 * 4 * size * 5 * 5 * 0.5)  # for half of five groups of five rows
    with pytest.warns(UserWarning, match=r"standard error of at most \d"):
        sketched = meter.measure(rollouts)
    gains = [float(update_gain([one.record.gram], 0, (1, 1)).statistic(np.ones(5))) for one in (exact, sketched)]
    assert gains[0] != gains[1]
    assert gains[1] == pytest.approx(gains[0], abs=0.5 * abs(gains[0]))
    assert exact.record.influence is not None
    assert sketched.record.influence is not None
    # Influences and sums over all questions need no sketch.
    np.testing.assert_allclose(sketched.record.influence.by_fold, exact.record.influence.by_fold, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sketched.directions, exact.directions)
