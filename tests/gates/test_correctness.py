"""The gate on incorrect rollouts."""

import pytest
import torch

from odp_callbacks.gates import IncorrectRolloutGate, tokens_of


def test_correct_rollouts_have_the_given_weight() -> None:
    tokens = tokens_of(torch.tensor([[1, 1], [1, 0]]), [0.0, 1.0])
    assert IncorrectRolloutGate()(tokens).tolist() == [1, 1, 0]
    assert IncorrectRolloutGate(correct_weight=0.5)(tokens).tolist() == [1, 1, 0.5]


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_an_invalid_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="`correct_weight` must be finite and not negative"):
        IncorrectRolloutGate(correct_weight=weight)


def test_the_error_without_rewards_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="give rewards"):
        IncorrectRolloutGate()(tokens_of(torch.ones(1, 1)))
