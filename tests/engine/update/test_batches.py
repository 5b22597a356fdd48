"""Batches of rollouts: what stays together, and what happens where memory does not suffice."""

import pytest
import torch

from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.update.batches import batches_of_rollouts, in_smaller_batches, tokens_in_memory
from tests.helpers.models import tiny


def make_rollouts(lengths: list[int]) -> list[Rollout]:
    """Two rollouts of each question, whose prompts have two tokens."""
    questions = [Question(str(i), {"prompt": ""}, torch.tensor([1, 6])) for i in range(len(lengths) // 2)]
    return [Rollout(questions[i // 2], tuple([6] * n), "", False, 0.0) for i, n in enumerate(lengths)]


LENGTHS = [8, 1, 3, 3, 2, 0, 9, 9]
QUESTIONS = [0, 0, 1, 1, 2, 2, 3, 3]


def batches(tokens: int, segments: int, keys: list[tuple[object, ...]] | None = None) -> list[list[int]]:
    found = batches_of_rollouts(
        make_rollouts(LENGTHS), QUESTIONS, list(range(8)), keys or [(0,)] * 8, max_tokens=tokens, max_segments=segments
    )
    return list(found)


def test_batches_hold_similar_lengths_and_no_empty_response() -> None:
    assert batches(10**6, 99) == [[4, 2, 3, 0, 1, 6, 7]]
    assert batches(22, 99) == [[4, 2, 3], [0, 1], [6, 7]]
    assert batches(3, 99) == [[4], [2], [3], [0], [1], [6], [7]]
    assert batches(10**6, 2) == [[4, 2], [3, 0], [1, 6], [7]]


def test_rollouts_with_different_keys_stay_apart() -> None:
    assert batches(10**6, 99, [(question % 2,) for question in QUESTIONS]) == [[4, 0, 1], [2, 3, 6, 7]]


def test_a_batch_that_does_not_fit_is_halved() -> None:
    def measure(batch: list[int]) -> int:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too large")
        return sum(batch)

    with pytest.warns(UserWarning, match="did not fit into memory"):
        assert list(in_smaller_batches(measure, [1, 2, 3, 4, 5])) == [([1, 2], 3), ([3], 3), ([4, 5], 9)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too large"), RuntimeError("another bug")])
def test_other_errors_and_single_rollouts_are_not_tried_again(error: Exception) -> None:
    def fail(batch: list[int]) -> int:
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(in_smaller_batches(fail, [1]))


def test_memory_bounds_the_tokens() -> None:
    assert tokens_in_memory(tiny()) > 100
    assert tokens_in_memory(tiny(), 1) == 1
