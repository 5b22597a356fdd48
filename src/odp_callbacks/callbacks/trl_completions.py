"""Completions and rewards in the tensors of TRL's trainers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from odp_callbacks.engine.prompts import Row


@dataclass(frozen=True)
class RecordedCompletion:
    """A completion as a trainer shows it.

    Attributes:
        prompt_ids: Token ids of the prompt.
        response_ids: Token ids of the completion.
        row: The row of the dataset; None if the trainer keeps the tokens only.
        reward: What the trainer scored it with, NaN where every reward function gave None; None if it did not score.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    row: Row | None = None
    reward: float | None = None


def unpadded(token_ids: Tensor, mask: Tensor) -> list[tuple[int, ...]]:
    """Return the token ids of each row without padding.

    Args:
        token_ids: ``(B, T)``.
        mask: ``(B, T)``, 1 where there is a token.

    Examples:
        >>> import torch
        >>> unpadded(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]))
        [(5, 6)]
    """
    return [tuple(row[keep].tolist()) for row, keep in zip(token_ids.cpu(), mask.cpu().bool(), strict=True)]


def completions_of_labels(batch: Mapping[str, Any], labels: Tensor) -> list[RecordedCompletion]:
    """Return the completions of a batch that has prompts of its own, and labels of -100 outside the completions.

    Args:
        batch: With ``prompts`` and ``prompt_attention_mask``, ``(B, P)`` each.
        labels: ``(B, T)``.
    """
    prompts = unpadded(batch["prompts"], batch["prompt_attention_mask"])
    return list(map(RecordedCompletion, prompts, unpadded(labels, labels != -100)))


def weighted_rewards(per_function: Tensor, weights: Tensor, limits: tuple[float, float] | None = None) -> list[float]:
    """Return the sum of all reward functions, as TRL weights it.

    Args:
        per_function: ``(B, F)``, NaN where a function gave None.
        weights: ``(F,)``.
        limits: Lowest and highest sum; others are clipped.

    Returns:
        ``B`` rewards, NaN where every function gave None.

    Examples:
        >>> import torch
        >>> weighted_rewards(torch.tensor([[1.0, 0.5], [1.0, torch.nan], [torch.nan] * 2]), torch.tensor([2.0, 1.0]))
        [2.5, 2.0, nan]
    """
    sums = (per_function.detach().cpu().double() * weights.detach().cpu()).nansum(dim=1)
    rewards: list[float] = (sums if limits is None else sums.clamp(*limits)).tolist()
    unscored = per_function.isnan().all(dim=1).tolist()
    return [math.nan if is_unscored else reward for reward, is_unscored in zip(rewards, unscored, strict=True)]
