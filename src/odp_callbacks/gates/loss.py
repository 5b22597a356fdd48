"""How a gate's weights act on the loss, and what is logged about them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odp_callbacks.functional.tokens import Tokens, tokens_of
from odp_callbacks.gates.protocols import Gate, Router


@dataclass(frozen=True)
class GatedLoss:
    """A loss whose tokens a gate has weighted.

    Attributes:
        loss: Scalar, differentiable.
        weights: ``(B, T)``, with a mean of 1 over the tokens if they were renormalised; 0 on padding.
        logs: What to log: ``gate/token_share`` and ``gate/rollout_share`` (the shares of tokens and rollouts with a
            weight above 0), ``gate/effective_share`` (Kish's effective number of tokens divided by their number, which
            is below ``token_share`` if the weights differ), all three of the rollouts that have a reward,
            ``gate/unscored_share`` (the share of rollouts without one), ``gate/loss_before`` (the mean over all
            tokens) and ``gate/loss_after``.
    """

    loss: Tensor
    weights: Tensor
    logs: dict[str, float]


def gate_loss(
    gate: Gate, losses: Tensor, mask: Tensor, tokens: Tokens | None = None, *, renormalise: bool = True
) -> GatedLoss:
    r"""Weight per-token losses by a gate: the one call that a training step of your own needs.

    .. math:: L = \frac{\sum_i w_i \ell_i}{\sum_i w_i}

    The loss thus keeps its scale, whatever share of the tokens has a weight. If no token of a batch has one, the loss
    and its gradients are exactly 0: there is no division by 0, every parameter still takes part (which DDP needs), and
    the optimizer's momentum and weight decay act as usual.

    Args:
        gate: Maps tokens to weights.
        losses: ``(B, T)``, the loss of each response token.
        mask: ``(B, T)``, 1 where there is a token.
        tokens: The tokens, in the order of ``losses[mask]``, as :func:`tokens_of` and :meth:`Tokens.with_policies`
            give them; None if only depth and length are known.
        renormalise: False divides by the number of tokens instead, so that a gate also lowers the loss.

    Returns:
        The loss, the weights, and what to log.

    Raises:
        ValueError: If shapes do not fit, or a weight is negative or not finite.

    Examples:
        >>> import torch
        >>> from odp_callbacks.gates import IncorrectRolloutGate, tokens_of
        >>> losses, mask = torch.tensor([[4.0, 2.0], [3.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> gated = gate_loss(IncorrectRolloutGate(), losses, mask, tokens_of(mask, rewards=[1.0, 0.0]))
        >>> gated.loss.item(), gated.logs["gate/loss_before"], gated.logs["gate/rollout_share"]
        (3.0, 3.0, 0.5)
    """
    if losses.dim() != 2 or losses.shape != mask.shape:
        raise ValueError(
            f"`losses` and `mask` must have one shape (B, T), but {tuple(losses.shape)} and {tuple(mask.shape)} "
            "were given."
        )
    weights, logs = gate_weights(gate, mask, tokens, renormalise=renormalise)
    weights, token_mask = weights.to(losses), mask.bool()
    # Losses with a weight of 0 are replaced, because 0 times an infinite loss would be NaN.
    loss = (weights * torch.where(weights > 0, losses, 0)).sum() / token_mask.sum().clamp(min=1)
    logs |= {"gate/loss_before": float(losses.detach()[token_mask].mean()), "gate/loss_after": float(loss.detach())}
    return GatedLoss(loss, weights, logs)


def gate_weights(
    gate: Gate, mask: Tensor, tokens: Tokens | None = None, *, renormalise: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """Compute the weight of each token of a padded batch, for a loss that is a mean over tokens.

    A rollout whose reward is NaN, because the reward function gave None, is not gated: its tokens have the weight 1.

    Args:
        gate: Maps tokens to weights.
        mask: ``(B, T)``, 1 where there is a token.
        tokens: As in :func:`gate_loss`.
        renormalise: Scale the weights to a mean of 1 over the tokens, unless all of them are 0.

    Returns:
        The weights ``(B, T)``, float32 at least and 0 on padding, and what to log; see :class:`GatedLoss`.

    Raises:
        ValueError: If shapes do not fit, or a weight is negative or not finite.
    """
    token_mask = mask.bool()
    tokens = tokens_of(token_mask) if tokens is None else tokens
    token_count = int(token_mask.sum())
    if len(tokens) != token_count:
        raise ValueError(f"`tokens` must hold the {token_count} tokens of `mask`, but holds {len(tokens)}.")
    is_scored = _is_scored(tokens)
    all_scored = bool(is_scored.all())
    scored_tokens = tokens if all_scored else tokens.take(is_scored)
    scored_count = len(scored_tokens)
    token_weights = checked_weights(gate, scored_tokens) if scored_count or all_scored else torch.ones(0)
    token_weights = token_weights.to(mask.device)
    total_weight = token_weights.sum()
    any_weight = bool(total_weight > 0)
    scaled = token_weights * (scored_count / total_weight) if renormalise and any_weight else token_weights
    has_weight = token_weights > 0
    scored_rollouts = len(scored_tokens.rollout.unique())
    rollouts_with_weight = len(scored_tokens.rollout[has_weight].unique())
    if not all_scored:
        scaled = token_weights.new_ones(token_count).masked_scatter(is_scored.to(mask.device), scaled)
    logs = {
        "gate/token_share": float(has_weight.float().mean()),
        "gate/rollout_share": rollouts_with_weight / scored_rollouts if scored_rollouts else float("nan"),
        "gate/effective_share": (
            float(total_weight**2 / (token_weights.square().sum() * scored_count)) if any_weight else 0.0
        ),
    }
    if tokens.reward is not None:
        rollout_count = int(token_mask.any(dim=1).sum())
        logs["gate/unscored_share"] = 1 - scored_rollouts / rollout_count if rollout_count else float("nan")
    return token_weights.new_zeros(mask.shape).masked_scatter(token_mask, scaled), logs


def _is_scored(tokens: Tokens) -> Tensor:
    """Which tokens are not of a rollout to which the reward function gave no reward, ``(N,)`` bool."""
    if tokens.reward is None:
        return torch.ones(len(tokens), dtype=torch.bool, device=tokens.rollout.device)
    return ~tokens.reward.isnan()


def checked_weights(gate: Gate, tokens: Tokens) -> Tensor:
    """Return a gate's weights ``(N,)`` without gradient, after checking them.

    Raises:
        ValueError: If their shape is wrong, or a weight is negative or not finite.
    """
    weights = torch.as_tensor(gate(tokens)).detach()
    weights = weights if weights.dtype == torch.float64 else weights.float()
    if weights.shape != (len(tokens),):
        raise ValueError(
            f"`gate` must give one weight for each of the {len(tokens)} tokens, but its shape is "
            f"{tuple(weights.shape)}."
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("`gate` must give weights that are finite and not negative.")
    return weights


def route(gate: object, tokens: Tokens) -> Tokens:
    """Return the same tokens with the teachers that the gate chooses, if it is a router.

    Raises:
        ValueError: If the gate does not choose a teacher for each token.
    """
    if not isinstance(gate, Router):
        return tokens
    teacher_index = gate.route(tokens)
    in_range = (teacher_index >= 0) & (teacher_index < len(tokens.teachers))
    if teacher_index.shape != (len(tokens),) or not bool(in_range.all()):
        raise ValueError(
            f"`gate` must route each of the {len(tokens)} tokens to one of {len(tokens.teachers)} teachers by its "
            f"index, but gave a tensor of shape {tuple(teacher_index.shape)}."
        )
    return replace(tokens, teacher=teacher_index)


def check_gate(gate: Gate, *, rewards: bool, policies: bool = True, teachers: tuple[str, ...] = ("teacher",)) -> None:
    """Try a gate on a few invented tokens before training.

    Args:
        gate: The gate.
        rewards: Whether the training knows rewards.
        policies: Whether the training knows both policies' logits.
        teachers: Names of the teachers.

    Raises:
        ValueError: If the gate needs something that the training does not know, or its weights are invalid.
    """
    if not callable(gate):
        raise ValueError(f"`gate` must be a function from tokens to weights, but {gate!r} was given.")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    tokens = tokens_of(mask, [1.0, 0.0] if rewards else None, ["a", "a"], teachers=teachers)
    if policies:
        logits = torch.linspace(-1, 1, 10).reshape(5, 2)
        tokens = tokens.with_policies(logits, -logits, torch.zeros(5, dtype=torch.long))
    checked_weights(gate, route(gate, tokens))
