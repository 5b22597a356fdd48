import pytest
import torch

from odp_callbacks.functional.working_precision import check_floating_point, check_temperature, working_dtype

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("given", "expected"),
    [((HALF,), SINGLE), ((HALF, BRAIN), SINGLE), ((SINGLE, BRAIN), SINGLE), ((HALF, DOUBLE), DOUBLE)],
)
def test_working_dtype_is_the_widest_and_at_least_single(given, expected):
    assert working_dtype(*(torch.zeros(1, dtype=dtype) for dtype in given)) == expected


@pytest.mark.parametrize("bad", [torch.zeros(2, dtype=torch.int32), torch.tensor(1.0), [1.0], None])
def test_check_floating_point_names_the_argument(bad):
    with pytest.raises(TypeError, match=r"`x` must be a floating-point tensor of shape \(\.\.\., V\)"):
        check_floating_point("x", bad)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan")])
def test_temperature_must_be_positive_and_finite(bad):
    with pytest.raises(ValueError, match="`temperature` must be a positive number"):
        check_temperature(bad)
