"""Attention by kernels that need no plan for each shape of a batch.

NVIDIA's cuDNN, which torch prefers on recent GPUs, builds a plan for every new shape, and every batch of a measurement
has another shape. Most of the time of a look at update gain went there (``benchmarks/gpu/compare.py``).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_attention_plans() -> Iterator[None]:
    """Leave cuDNN out of the choice of attention kernels within the block, unless it is the only choice.

    Examples:
        >>> with without_attention_plans():
        ...     inside = torch.backends.cuda.cudnn_sdp_enabled()
        >>> inside, torch.backends.cuda.cudnn_sdp_enabled()
        (False, True)
    """
    kernels = torch.backends.cuda
    others = (kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled())
    if not kernels.cudnn_sdp_enabled() or not any(others):
        yield
        return
    kernels.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        kernels.enable_cudnn_sdp(True)
