"""Attention to one part with the log-sum-exp of its scores, by one kernel of torch where there is one.

``torch.nn.functional.scaled_dot_product_attention`` does not return log-sum-exps; the operators behind it do.
"""

from functools import cache

import torch
from torch import Tensor

TRIAL_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-2}
"""Largest error of the trial's outputs; float32 may be computed in TF32."""


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Attend by one kernel.

    Args:
        query: ``(G, H, N, D)``.
        key: ``(G, H, T, D)``.
        value: ``(G, H, T, D)``.
        scale: Factor of the scores.
        mask: Added to the scores; broadcasts to ``(G, H, N, T)``.

    Returns:
        ``(G, H, N, D)`` and the log-sum-exps ``(G, H, N)``; None where no kernel serves.

    Examples:
        >>> query, key = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
        >>> output, log_sums = fused_attention(query, key, torch.arange(8.0).view(1, 1, 4, 2), 1.0, None)
        >>> output.tolist(), round(float(log_sums.exp()), 4)
        ([[[[3.0, 4.0]]]], 4.0)
    """
    if key.shape[-1] != value.shape[-1]:
        return None
    if query.device.type == "cpu":
        if mask is not None and len(mask) != len(query):
            mask = mask.expand(len(query), -1, -1, -1)
        output, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        return output, log_sums
    if query.device.type == "cuda" and _works_on_cuda(query.device, query.dtype, query.shape[-1]):
        return memory_efficient_attention(query, key, value, scale, mask)
    return None


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend by torch's memory-efficient kernel for CUDA; the arguments are those of :func:`fused_attention`.

    Args:
        query: ``(G, H, N, D)``.
        key: ``(G, H, T, D)``.
        value: ``(G, H, T, D)``.
        scale: Factor of the scores.
        mask: Its rows start at multiples of 16 numbers, as
            :func:`~odp_callbacks.engine.sampling.shared_prefix.additive_mask` makes them.
    """
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    output, log_sums, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, False, scale=scale
    )
    return output, log_sums[:, :, : query.shape[2]]


@cache
def _works_on_cuda(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel gives what the textbook does: it was written where there was no GPU to try it on."""
    from odp_callbacks.engine.sampling.shared_prefix import additive_mask

    if dtype not in TRIAL_TOLERANCES:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, length, width, generator=generator).to(device, dtype) for length in (5, 19, 19)
    )
    visible = (torch.rand(2, 1, 5, 19, generator=generator) < 0.5).to(device)
    visible[..., 0] = True
    visible[0, 0, 0] = False  # a row that sees nothing must not spoil what it is merged with
    mask = additive_mask(visible, dtype)
    try:
        output, log_sums = memory_efficient_attention(query, key, value, 0.3, mask)
    except (RuntimeError, NotImplementedError):
        return False
    scores = query.float() @ key.float().mT * 0.3 + mask.float()
    expected, expected_sums = torch.softmax(scores, -1) @ value.float(), torch.logsumexp(scores, -1)
    seen = visible.any(-1).expand(-1, 3, -1)
    tolerance = TRIAL_TOLERANCES[dtype]
    return bool(
        output.isfinite().all()
        and (output.float() - expected)[seen].abs().max() < tolerance
        and (log_sums - expected_sums)[seen].abs().max() < tolerance
        and not log_sums.isnan().any()
        and (log_sums[~seen] < -1e4).all()
    )
