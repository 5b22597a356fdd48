import torch

from odp_callbacks.engine.sampling.fused_kernels import fused_attention, memory_efficient_attention
from odp_callbacks.engine.sampling.shared_prefix import additive_mask


def test_the_kernel_for_cuda_takes_these_arguments():
    """Its numbers are tried on the GPU at the first use; without a GPU, torch still tells the shapes."""
    query, key = (torch.zeros(2, 3, length, 16, dtype=torch.bfloat16, device="meta") for length in (5, 19))
    mask = additive_mask(torch.ones(2, 1, 5, 19, dtype=torch.bool, device="meta"), torch.bfloat16)
    assert mask.stride(-2) % 16 == 0
    output, log_sums = memory_efficient_attention(query, key, key, 0.3, mask)
    assert output.shape == query.shape
    assert log_sums.shape == (2, 3, 5)
    assert log_sums.dtype == torch.float32


def test_values_of_another_width_are_left_to_the_textbook():
    query, key, value = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 5)
    assert fused_attention(query, key, value, 1.0, None) is None
