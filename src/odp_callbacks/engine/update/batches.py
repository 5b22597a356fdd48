"""Batches of rollouts for one pass through the model: as many as memory holds, those of a question together."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from odp_callbacks.engine.gradients.layer_sizes import linear_features
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.memory import free_bytes

BATCH_TOKENS = {"cpu": 2048}
"""Tokens that go through the model at a time, at most; a CPU is busy with fewer."""
BATCH_TOKENS_ELSEWHERE = 32768
KEPT_TENSORS = 1.5
"""Numbers that are kept for the backward pass, relative to those that the linear layers read and write."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def tokens_in_memory(model: nn.Module, max_memory_bytes: float | None = None) -> int:
    """How many tokens fit into one forward pass whose activations are kept for a backward, by an estimate.

    Args:
        model: The student.
        max_memory_bytes: Limit in bytes; None for half of what is free.
    """
    device = next(model.parameters()).device
    return max(1, min(useful_tokens(device), tokens_in_graph(device, linear_features(model), max_memory_bytes)))


def tokens_in_graph(device: torch.device, features: int, max_memory_bytes: float | None = None) -> int:
    """The same, also where more tokens would not be faster.

    Args:
        device: Where the student is.
        features: Of its linear layers, by :func:`~odp_callbacks.engine.gradients.layer_sizes.linear_features`.
        max_memory_bytes: Limit in bytes; None for half of what is free.
    """
    return int(free_bytes(device, max_memory_bytes) / max(1.0, 4 * KEPT_TENSORS * features))


def useful_tokens(device: torch.device) -> int:
    """Tokens that go through a model at a time, at most, where memory sets no limit: more make it no faster."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS_ELSEWHERE)


def batches_of_rollouts(
    rollouts: Sequence[Rollout],
    question_of: Sequence[int],
    segments: Sequence[int],
    keys: Sequence[tuple[object, ...]],
    *,
    max_tokens: int,
    max_segments: int,
    among: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Yield batches of similar length.

    Args:
        rollouts: The rollouts; those without a token are left out.
        question_of: The question of each.
        segments: The segment of each, whose gradients are kept apart.
        keys: Rollouts of one batch have the same key.
        max_tokens: Tokens of a batch with its padding, at most; a single rollout may have more.
        max_segments: Segments of a batch, at most.
        among: Indices of the rollouts that are batched; None for all.
    """
    lengths = [len(rollout.question.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
    longest: dict[int, int] = {}
    for question, length in zip(question_of, lengths, strict=True):
        longest[question] = max(length, longest.get(question, 0))
    order = sorted(
        (index for index in (range(len(rollouts)) if among is None else among) if rollouts[index].response_ids),
        key=lambda index: (keys[index], longest[question_of[index]], question_of[index], segments[index], index),
    )
    batch: list[int] = []
    width = 0
    for index in order:
        width = max(width, lengths[index])
        inside = {segments[other] for other in batch} | {segments[index]}
        full = (len(batch) + 1) * width > max_tokens or len(inside) > max_segments
        if batch and (full or keys[index] != keys[batch[0]]):
            yield batch
            batch, width = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def parts_within(batch: Sequence[Item], costs: Sequence[float], limit: float) -> Iterator[list[Item]]:
    """Yield consecutive parts of a batch whose costs add up to ``limit`` at most; an item may exceed it alone.

    Examples:
        >>> list(parts_within("abcd", [2, 2, 5, 1], 4))
        [['a', 'b'], ['c'], ['d']]
    """
    part: list[Item] = []
    spent = 0.0
    for item, cost in zip(batch, costs, strict=True):
        if part and spent + cost > limit:
            yield part
            part, spent = [], 0.0
        part.append(item)
        spent += cost
    if part:
        yield part


def in_smaller_batches(
    function: Callable[[list[Item]], Result], batch: list[Item]
) -> Iterator[tuple[list[Item], Result]]:
    """Call ``function`` on a batch, and on its halves where memory does not suffice.

    Args:
        function: Called with a batch.
        batch: At least one item.

    Yields:
        Parts of the batch, and what the function returned.

    Raises:
        RuntimeError: If memory does not suffice for one item.
    """
    result = None
    try:
        result = [function(batch)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
    if result is not None:
        yield batch, result[0]
        return
    # Outside of the handler: the error would hold the tensors of the failed attempt.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn(
        f"a batch of {len(batch)} rollouts did not fit into memory and is measured in halves; a smaller "
        "`max_memory_bytes` would avoid the attempt.",
        stacklevel=2,
    )
    middle = len(batch) // 2
    yield from in_smaller_batches(function, batch[:middle])
    yield from in_smaller_batches(function, batch[middle:])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, on an accelerator or for the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
