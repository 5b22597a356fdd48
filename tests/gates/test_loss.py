"""How a gate acts on a loss."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from odp_callbacks.gates import IncorrectRolloutGate, check_gate, gate_loss, gate_weights, tokens_of
from odp_callbacks.gates.rules import everything

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])


def example_losses() -> Tensor:
    return torch.arange(9, dtype=torch.float64).reshape(3, 3).requires_grad_()


def test_weights_of_one_give_the_mean_over_tokens_bit_for_bit() -> None:
    losses = example_losses()
    gated = gate_loss(everything, losses, MASK)
    assert gated.loss == (losses * MASK).sum() / MASK.sum()
    assert gated.weights.tolist() == MASK.tolist()


@given(st.lists(st.floats(0, 100), min_size=6, max_size=6), st.floats(0.001, 1000))
def test_the_loss_is_a_weighted_mean_whatever_the_scale_of_the_weights(weights: list[float], scale: float) -> None:
    token_weights = torch.tensor(weights, dtype=torch.float64)
    losses = example_losses().detach()
    gated = gate_loss(lambda tokens: scale * token_weights, losses, MASK)
    token_losses = losses[MASK.bool()]
    if float((scale * token_weights).sum()) == 0:
        assert gated.loss == 0
    else:
        torch.testing.assert_close(gated.loss, (token_weights * token_losses).sum() / token_weights.sum())
        assert float(token_losses.min()) - 1e-9 <= float(gated.loss) <= float(token_losses.max()) + 1e-9
        assert float(gated.weights.sum()) == pytest.approx(6)


def test_gradients_are_the_weights_over_the_number_of_tokens() -> None:
    losses = example_losses()
    gated = gate_loss(IncorrectRolloutGate(), losses, MASK, tokens_of(MASK, [0.0, 1.0, 1.0]))
    (gradient,) = torch.autograd.grad(gated.loss, losses)
    torch.testing.assert_close(gradient, gated.weights / 6)
    assert gradient.tolist() == [[1 / 3] * 3, [0] * 3, [0] * 3]


def test_a_batch_without_an_incorrect_rollout_has_a_loss_and_gradients_of_exactly_0() -> None:
    losses = example_losses()
    gated = gate_loss(IncorrectRolloutGate(), losses, MASK, tokens_of(MASK, [1.0, 1.0, 1.0]))
    assert gated.loss == 0
    (gradient,) = torch.autograd.grad(gated.loss, losses)
    assert gradient.abs().sum() == 0
    assert gated.logs["gate/token_share"] == gated.logs["gate/rollout_share"] == gated.logs["gate/effective_share"] == 0
    assert gated.logs["gate/loss_before"] == pytest.approx(float(losses.detach()[MASK.bool()].mean()))


def test_without_renormalisation_the_gate_lowers_the_loss() -> None:
    losses, tokens = example_losses(), tokens_of(MASK, [0.0, 1.0, 1.0])
    gated = gate_loss(IncorrectRolloutGate(), losses, MASK, tokens, renormalise=False)
    assert gated.loss == losses[0].sum() / 6


def test_an_infinite_loss_with_weight_0_does_not_reach_the_student() -> None:
    losses = example_losses().detach()
    losses[1, 0] = torch.inf
    losses.requires_grad_()
    gated = gate_loss(IncorrectRolloutGate(), losses, MASK, tokens_of(MASK, [0.0, 1.0, 1.0]))
    (gradient,) = torch.autograd.grad(gated.loss, losses)
    assert torch.isfinite(gated.loss)
    assert torch.isfinite(gradient).all()


def test_the_logs_say_what_was_gated() -> None:
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0, 0.0])
    logs = gate_loss(lambda tokens: weights, example_losses(), MASK).logs
    assert logs["gate/token_share"] == pytest.approx(3 / 6)
    assert logs["gate/rollout_share"] == pytest.approx(2 / 3)
    assert logs["gate/effective_share"] == pytest.approx(16 / 6 / 6)
    assert logs["gate/loss_after"] == pytest.approx((0 + 1 + 2 * 6) / 4)


@pytest.mark.parametrize(
    ("gate", "match"),
    [
        (lambda tokens: torch.ones(2), "one weight for each of the 6 tokens, but its shape is \\(2,\\)"),
        (lambda tokens: torch.full((6,), torch.nan), "finite and not negative"),
        (lambda tokens: torch.full((6,), torch.inf), "finite and not negative"),
    ],
)
def test_invalid_weights_are_refused(gate: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        gate_loss(gate, example_losses(), MASK)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape \\(B, T\\)"):
        gate_loss(everything, torch.ones(3, 2), MASK)
    with pytest.raises(ValueError, match="`tokens` must hold the 6 tokens"):
        gate_loss(everything, example_losses(), MASK, tokens_of(torch.ones(1, 2)))


def test_a_router_that_chooses_no_existing_teacher_is_refused() -> None:
    class InvalidRouter:
        def __call__(self, tokens: Any) -> Tensor:
            return torch.ones(len(tokens))

        def route(self, tokens: Any) -> Tensor:
            return torch.full((len(tokens),), 7)

    with pytest.raises(ValueError, match="to one of 1 teachers"):
        check_gate(InvalidRouter(), rewards=True)


def test_a_rollout_without_a_reward_is_not_gated_and_the_others_are_as_if_it_were_not_there() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    rewards = [1.0, float("nan"), 0.0, 0.5]
    weights, logs = gate_weights(IncorrectRolloutGate(), mask, tokens_of(mask, rewards, ["a", "a", "b", "b"]))
    scored = torch.tensor([True, False, True, True])
    others = tokens_of(mask[scored], [1.0, 0.0, 0.5], ["a", "b", "b"])
    expected, expected_logs = gate_weights(IncorrectRolloutGate(), mask[scored], others)
    assert torch.equal(weights[scored], expected)
    assert weights[1].tolist() == [1, 1, 0]
    assert logs == {**expected_logs, "gate/unscored_share": 0.25}
    assert weights.sum() == mask.sum(), "the loss keeps its scale"


def test_rollouts_without_a_reward_do_not_count_in_pass_rates() -> None:
    mask = torch.ones(3, 1)
    tokens = tokens_of(mask, [1.0, float("nan"), 0.0], ["a", "a", "b"])
    assert tokens.need("pass_rate").tolist() == [1.0, 1.0, 0.0]


def test_a_batch_without_any_reward_is_not_gated() -> None:
    mask = torch.ones(2, 2)
    weights, logs = gate_weights(IncorrectRolloutGate(), mask, tokens_of(mask, [float("nan")] * 2))
    assert weights.tolist() == [[1, 1], [1, 1]]
    assert logs["gate/unscored_share"] == 1
