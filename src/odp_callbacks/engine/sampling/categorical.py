"""Draw tokens from the student's policy."""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_SIZE = 256
"""Tokens of the vocabulary in one block; a draw chooses a block first, then a token in it."""


def sample_tokens(
    logits: Tensor, temperature: float, uniform_draws: Tensor | None = None, max_elements: int = 2**18
) -> tuple[Tensor, Tensor]:
    r"""Draw one token for each row from :math:`\mathrm{softmax}(z / \tau)`, without top-k, top-p or any other limit.

    A token is drawn by inversion in two levels: first a block of the vocabulary, then a token in it.
    ``torch.multinomial`` draws a random number for every token of the vocabulary, and on a CPU one after the other:
    for 256 rows of 49,152 it takes about ten times as long (``benchmarks/sampling.py``).

    Args:
        logits: ``(B, V)``, floating.
        temperature: Positive.
        uniform_draws: ``(B, 2)`` float64, uniform in [0, 1); the tokens are a function of them. None draws them from
            torch's global stream.
        max_elements: The largest number of weights to hold at a time.

    Returns:
        The tokens, ``(B,)`` int64, and whether the row's logits define a distribution, ``(B,)`` bool. Where they do
        not (one is NaN or infinite), the token has no meaning.

    Examples:
        >>> import torch
        >>> tokens, valid = sample_tokens(torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]]), 1.0)
        >>> tokens.tolist(), valid.tolist()
        ([1, 0], [True, True])
    """
    from transformers import TemperatureLogitsWarper

    temperature_warper = TemperatureLogitsWarper(float(temperature))
    row_count, vocabulary_size = logits.shape
    padded_size = -(-vocabulary_size // BLOCK_SIZE) * BLOCK_SIZE
    rows_per_chunk = max(1, max_elements // padded_size)
    if uniform_draws is None:
        uniform_draws = torch.rand(row_count, 2, dtype=torch.float64, device=logits.device)
    tokens, valid = [], []
    for chunk, draws in zip(logits.split(rows_per_chunk), uniform_draws.split(rows_per_chunk), strict=True):
        scaled = temperature_warper(None, chunk if chunk.dtype == torch.float64 else chunk.float())
        weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp_()
        blocks = F.pad(weights, (0, padded_size - vocabulary_size)).unflatten(-1, (-1, BLOCK_SIZE))  # (B, V / 256, 256)
        block_index, total = _invert(blocks.sum(dim=-1, dtype=torch.float64), draws[:, :1])
        chosen_blocks = blocks[torch.arange(len(chunk), device=logits.device), block_index]
        index_in_block, _ = _invert(chosen_blocks.double(), draws[:, 1:])
        tokens.append(block_index * BLOCK_SIZE + index_in_block)
        valid.append(total.isfinite())
    # A row without a distribution must still give a token that has an embedding.
    return torch.cat(tokens).clamp_(max=vocabulary_size - 1), torch.cat(valid)


def check_probabilities(valid: Tensor) -> None:
    """Raise an error unless all rows of :func:`sample_tokens` were distributions.

    Raises:
        FloatingPointError: If a row was not a distribution.
    """
    if not valid.all():
        raise FloatingPointError("the student's logits are not finite, so no continuation can be sampled.")


def _invert(weights: Tensor, uniform_draws: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative sums of ``weights``; a weight of 0 is never chosen.

    Args:
        weights: ``(B, N)`` float64, non-negative.
        uniform_draws: ``(B, 1)`` float64 in [0, 1).

    Returns:
        The chosen indices ``(B,)`` int64, and the sums of the weights ``(B,)``.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    index = torch.searchsorted(cumulative, uniform_draws * total, right=True).squeeze(-1)
    # Only a NaN gives an index beyond the last: draws are below 1, and their product with the total is rounded to
    # less than the total.
    return index.clamp_(max=weights.shape[-1] - 1), total.squeeze(-1)
