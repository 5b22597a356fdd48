"""Drawing tokens from the student's policy."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TemperatureLogitsWarper

BLOCK = 256
"""Tokens that are weighed together before one of them is drawn."""


@dataclass(frozen=True)
class Continuation:
    """Sampled tokens, with the end token if one came; ``truncated`` where the limit cut it."""

    tokens: tuple[int, ...]
    truncated: bool


def sample_tokens(
    logits: Tensor, temperature: float, draws: Tensor | None = None, most_elements: int = 2**18
) -> tuple[Tensor, Tensor]:
    r"""Draw one token for each row from :math:`\mathrm{softmax}(z / \tau)`, without any restriction.

    By inversion, in two levels: first a block of the vocabulary, then a token in it. ``torch.multinomial`` draws a
    random number for every token of the vocabulary, and on a CPU one after the other: for 256 rows of 49,152 it takes
    some ten times as long (``benchmarks/sampling.py``).

    Args:
        logits: ``(B, V)``, floating.
        temperature: Positive.
        draws: ``(B, 2)`` float64, uniform in [0, 1), of which the tokens are a function; None draws them from torch's
            global stream.
        most_elements: The most weights to hold at a time.

    Returns:
        ``(B,)`` int64, and ``(B,)`` bool: whether the row's logits were a distribution. Where they were not (a NaN),
        the token means nothing.

    Examples:
        >>> import torch
        >>> tokens, sound = sample_tokens(torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]]), 1.0)
        >>> tokens.tolist(), sound.tolist()
        ([1, 0], [True, True])
    """
    warp = TemperatureLogitsWarper(float(temperature))
    size = -(-logits.shape[-1] // BLOCK) * BLOCK
    rows = max(1, most_elements // size)
    u_all = torch.rand(len(logits), 2, dtype=torch.float64, device=logits.device) if draws is None else draws
    tokens, sound = [], []
    for part, u in zip(logits.split(rows), u_all.split(rows), strict=True):
        z = warp(None, part if part.dtype == torch.float64 else part.float())
        weights = F.pad((z - z.amax(dim=-1, keepdim=True)).exp_(), (0, size - z.shape[-1]))
        blocks = weights.unflatten(-1, (-1, BLOCK))  # (B, V / 256, 256)
        which, total = _invert(blocks.sum(dim=-1, dtype=torch.float64), u[:, :1])
        inside, _ = _invert(blocks[torch.arange(len(part), device=logits.device), which].double(), u[:, 1:])
        tokens.append(which * BLOCK + inside)
        sound.append(total.isfinite())
    # A row without a distribution must still give a token that an embedding has.
    return torch.cat(tokens).clamp_(max=logits.shape[-1] - 1), torch.cat(sound)


def check_probabilities(sound: Tensor) -> None:
    """Raise ``FloatingPointError`` unless all rows of :func:`sample_tokens` were distributions."""
    if not sound.all():
        raise FloatingPointError("the student's logits are not finite, so no continuation can be sampled.")


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Place ``(B,)`` of ``u`` in the cumulated weights ``(B, N)``, never on a weight of 0; and their sums ``(B,)``."""
    cumulated = weights.cumsum(dim=-1)
    total = cumulated[:, -1:]
    place = torch.searchsorted(cumulated, u * total, right=True).squeeze(-1)
    # Only a NaN gets beyond the last: u < 1, and a product with it rounds to less than the total.
    return place.clamp_(max=weights.shape[-1] - 1), total.squeeze(-1)
