"""Draw tokens from the student's policy."""

import torch
from torch import Tensor

BLOCK_SIZE = 256
"""Tokens of the vocabulary in one block; a draw chooses a block first, then a token in it."""
MAX_ELEMENTS = {"cpu": 2**22}
"""Probabilities to hold at a time, by device type: on a CPU, new memory beyond 32 MiB is slower than the arithmetic."""
ACCELERATOR_MAX_ELEMENTS = 2**28


def sample_tokens(
    logits: Tensor, temperature: float, uniform_draws: Tensor | None = None, max_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Draw one token for each row from :math:`\mathrm{softmax}(z / \tau)`, without top-k, top-p or any other limit.

    A token is drawn by inversion in two levels: first a block of the vocabulary, then a token in it.
    ``torch.multinomial`` draws a random number for every token of the vocabulary, and on a CPU one after the other:
    for 256 rows of 49,152 it takes more than ten times as long (``benchmarks/sampling.py``).

    Args:
        logits: ``(B, V)``, floating.
        temperature: Positive.
        uniform_draws: ``(B, 2)`` float64, uniform in [0, 1); the tokens are a function of them. None draws them from
            torch's global stream.
        max_elements: The largest number of probabilities to hold at a time, at least one row of them; None: 4 million
            on a CPU, 268 million (1 GiB) on an accelerator.

    Returns:
        The tokens, ``(B,)`` int64, and whether the row's logits define a distribution, ``(B,)`` bool. Where they do
        not (one is NaN or infinite), the token has no meaning.

    Examples:
        >>> import torch
        >>> tokens, valid = sample_tokens(torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]]), 1.0)
        >>> tokens.tolist(), valid.tolist()
        ([1, 0], [True, True])
    """
    row_count, vocabulary_size = logits.shape
    if max_elements is None:
        max_elements = MAX_ELEMENTS.get(logits.device.type, ACCELERATOR_MAX_ELEMENTS)
    rows_per_chunk = max(1, max_elements // vocabulary_size)
    if uniform_draws is None:
        uniform_draws = torch.rand(row_count, 2, dtype=torch.float64, device=logits.device)
    if row_count <= rows_per_chunk:
        return _sample_chunk(logits, temperature, uniform_draws)
    chunks = [
        _sample_chunk(chunk, temperature, draws)
        for chunk, draws in zip(logits.split(rows_per_chunk), uniform_draws.split(rows_per_chunk), strict=True)
    ]
    tokens, valid = zip(*chunks, strict=True)
    return torch.cat(tokens), torch.cat(valid)


def _sample_chunk(logits: Tensor, temperature: float, uniform_draws: Tensor) -> tuple[Tensor, Tensor]:
    """Draw tokens for all rows at once."""
    from transformers import TemperatureLogitsWarper

    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide if temperature == 1 else TemperatureLogitsWarper(float(temperature))(None, wide)
    probabilities = torch.softmax(scaled, dim=-1)  # (B, V)
    vocabulary_size = logits.shape[1]
    whole_blocks = vocabulary_size // BLOCK_SIZE * BLOCK_SIZE
    sums = [probabilities[:, :whole_blocks].unflatten(-1, (-1, BLOCK_SIZE)).sum(dim=-1)] if whole_blocks else []
    if whole_blocks < vocabulary_size:
        sums.append(probabilities[:, whole_blocks:].sum(dim=-1, keepdim=True))
    block_sums = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
    block_index, total = _invert(block_sums.double(), uniform_draws[:, :1])
    # The last block may be shorter; what lies behind it counts as 0.
    places = block_index[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=logits.device)
    in_block = probabilities.gather(1, places.clamp(max=vocabulary_size - 1)).double() * (places < vocabulary_size)
    index_in_block, _ = _invert(in_block, uniform_draws[:, 1:])
    # A row without a distribution must still give a token that has an embedding.
    tokens = (block_index * BLOCK_SIZE + index_in_block).clamp_(max=vocabulary_size - 1)
    return tokens, total.isfinite()


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
