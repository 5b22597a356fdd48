import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.engine.sampling.attention import attend, merge


def whole(q, k, v, scale, mask=None, softcap=None, sink=None):
    """Attention as a textbook has it."""
    scores = q @ k.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if mask is None else scores + mask
    if sink is None:
        return torch.softmax(scores, -1) @ v
    scores = torch.cat([scores, sink[..., None].expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    queries=st.integers(1, 5),
    scale=st.floats(0.1, 30),
    softcap=st.sampled_from([None, 3.0]),
    fused=st.booleans(),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_parts_merge_to_the_whole(sizes, queries, scale, softcap, fused, sinks, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, queries, 4, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, 3, sum(sizes), 4, generator=g, dtype=torch.float64) for _ in range(2))
    # Each query sees something, perhaps nothing of some part.
    seen = torch.rand(2, 1, queries, sum(sizes), generator=g) < 0.6
    seen[..., 0] = True
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, torch.finfo(torch.float64).min)
    sink = torch.randn(1, 3, queries, generator=g, dtype=torch.float64) if sinks else None
    parts, first = [], 0
    for size in sizes:
        at = slice(first, first + size)
        parts.append(attend(q, k[:, :, at], v[:, :, at], scale, mask[..., at], softcap, fused))
        first += size
    found = merge(parts, sink)
    torch.testing.assert_close(found, whole(q, k, v, scale, mask, softcap, sink), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_weighed_in_full(dtype, fused):
    q, k, v = (torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    out, total = attend(q, k, v, 0.5, fused=fused)
    assert out.dtype == dtype
    assert total.dtype == torch.float32
    exact = whole(q.double(), k.double(), v.double(), 0.5)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    expected = torch.logsumexp(q.double() @ k.double().mT * 0.5, -1)
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)
