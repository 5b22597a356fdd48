import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from odp_callbacks.functional import gradient_alignment
from tests.helpers.models import DTYPES

FINITE = st.floats(-1e300, 1e300, allow_nan=False)
PAIRS = st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20)
MODERATE = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=20)


def vectors_of(pairs):
    return torch.tensor(pairs, dtype=torch.float64).T


@given(PAIRS)
def test_lies_in_minus_one_to_one_or_is_undefined(pairs):
    a, b = vectors_of(pairs)
    score = gradient_alignment(a, b)
    assert bool(score.isnan()) == (not a.any() or not b.any())
    assert score.isnan() or -1 <= score <= 1
    assert torch.equal(score.nan_to_num(), gradient_alignment(b, a).nan_to_num())


@given(MODERATE, st.floats(1e-150, 1e150), st.floats(1e-150, 1e150))
def test_does_not_depend_on_scale(pairs, scale_a, scale_b):
    a, b = vectors_of(pairs)
    assume(a.abs().max() > 1e-100 and b.abs().max() > 1e-100)
    expected = gradient_alignment(a, b)
    assert abs(gradient_alignment(scale_a * a, scale_b * b) - expected) < 1e-12
    assert abs(gradient_alignment(-scale_a * a, scale_b * b) + expected) < 1e-12


def test_equals_the_plain_cosine():
    torch.manual_seed(0)
    a, b = torch.randn(2, 30, 40, dtype=torch.float64)
    expected = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(gradient_alignment(a, b), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_of_a_dtype_neither_underflow_nor_overflow(dtype):
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    a = torch.tensor([[tiny, tiny], [huge, huge], [tiny, -tiny]], dtype=dtype)
    b = torch.tensor([huge, huge], dtype=dtype)
    score = gradient_alignment(a, b)
    assert score.dtype == dtype
    torch.testing.assert_close(score, torch.tensor([1, 1, 0], dtype=dtype), rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_is_nan_where_a_gradient_is_zero_or_not_finite(bad):
    a = torch.tensor([[0.0, bad], [1.0, 0.0]])
    score = gradient_alignment(a, torch.ones(2, 2))
    assert score[0].isnan()
    assert score[1] == pytest.approx(math.sqrt(0.5), rel=1e-6)


def test_broadcasts_and_takes_the_wider_dtype():
    score = gradient_alignment(torch.randn(4, 1, 6, dtype=torch.bfloat16), torch.randn(3, 6, dtype=torch.float64))
    assert score.shape == (4, 3)
    assert score.dtype == torch.float64


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="last dimension, but 2 and 3 do not"):
        gradient_alignment(torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match=r"`b` must be a floating-point tensor .* \(2,\) torch.int64 was given"):
        gradient_alignment(torch.zeros(2), torch.zeros(2, dtype=torch.long))
