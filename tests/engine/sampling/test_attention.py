import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.engine.sampling.attention import attend, merge


def textbook_attention(query, key, value, scale, mask=None, softcap=None, sink_scores=None):
    """Attention to everything at once, as a textbook defines it."""
    scores = query @ key.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if mask is None else scores + mask
    if sink_scores is None:
        return torch.softmax(scores, -1) @ value
    scores = torch.cat([scores, sink_scores[..., None].expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(scores, -1)[..., :-1] @ value


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    query_count=st.integers(1, 5),
    scale=st.floats(0.1, 30),
    softcap=st.sampled_from([None, 3.0]),
    fused=st.booleans(),
    has_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_merged_parts_equal_attention_to_everything(sizes, query_count, scale, softcap, fused, has_sinks, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 3, query_count, 4, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, 3, sum(sizes), 4, generator=generator, dtype=torch.float64) for _ in range(2))
    # Each query sees at least one position, but it may see no position of some part.
    visible = torch.rand(2, 1, query_count, sum(sizes), generator=generator) < 0.6
    visible[..., 0] = True
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill_(~visible, torch.finfo(torch.float64).min)
    sink_scores = torch.randn(1, 3, query_count, generator=generator, dtype=torch.float64) if has_sinks else None
    parts, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        parts.append(attend(query, key[:, :, part], value[:, :, part], scale, mask[..., part], softcap, fused))
        first += size
    merged = merge(parts, sink_scores)
    expected = textbook_attention(query, key, value, scale, mask, softcap, sink_scores)
    torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype, fused):
    query, key, value = (
        torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3)
    )
    output, log_sums = attend(query, key, value, 0.5, fused=fused)
    assert output.dtype == dtype
    assert log_sums.dtype == torch.float32
    expected_output = textbook_attention(query.double(), key.double(), value.double(), 0.5)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), expected_output, rtol=tolerance, atol=tolerance)
    expected_log_sums = torch.logsumexp(query.double() @ key.double().mT * 0.5, -1)
    torch.testing.assert_close(log_sums.double(), expected_log_sums, rtol=tolerance, atol=tolerance)
