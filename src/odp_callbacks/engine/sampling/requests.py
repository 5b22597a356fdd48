"""What a caller asks for and what it gets: requests for continuations, and the continuations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ContinuationRequest:
    """Where a continuation starts, and how long it may become.

    Attributes:
        sequence: Index of the prefilled sequence that it continues.
        prefix_length: How many of that sequence's first tokens come before ``first_token``.
        first_token: The token after them, which the model reads first: a rollout's last prompt token, or the first
            token of a branch. It is given, not sampled.
        max_new_tokens: The largest number of tokens to sample after ``first_token``, at least 1.
    """

    sequence: int
    prefix_length: int
    first_token: int
    max_new_tokens: int


def stacked_prefixes(
    sequences: Sequence[Tensor], requests: Sequence[ContinuationRequest], device: torch.device
) -> Tensor:
    """The tokens that the model reads before it samples the first one, of requests whose prefixes are equally long.

    Args:
        sequences: ``(T_s,)`` int64 each.
        requests: ``B`` requests; all have the same ``prefix_length``.
        device: Where the tokens are needed.

    Returns:
        ``(B, T)`` int64: each prefix and its first token.

    Examples:
        >>> requests = [ContinuationRequest(0, 2, 9, max_new_tokens=1)]
        >>> stacked_prefixes([torch.tensor([5, 6, 7])], requests, torch.device("cpu")).tolist()
        [[5, 6, 9]]
    """
    prefixes = [
        torch.cat([sequences[request.sequence][: request.prefix_length].cpu(), torch.tensor([request.first_token])])
        for request in requests
    ]
    return torch.stack(prefixes).to(device)


@dataclass(frozen=True)
class Continuation:
    """A sampled continuation.

    Attributes:
        tokens: The sampled tokens, including the end token if one was sampled.
        truncated: Whether the length limit, or a deadline, cut the continuation before an end token.
        unfinished: Whether a deadline cut it; it may have no token then.
    """

    tokens: tuple[int, ...]
    truncated: bool
    unfinished: bool = False


FinishedCallback = Callable[[dict[int, Continuation]], None]
"""Called with the continuations that have finished since the last call, by the index of their request."""
