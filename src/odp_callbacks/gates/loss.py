"""From weights to the loss: how a gate acts, and what is said of it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odp_callbacks.gates.tokens import Gate, Router, Tokens, tokens_of


@dataclass(frozen=True)
class GatedLoss:
    """A loss on which a gate has acted.

    Attributes:
        loss: Scalar, differentiable.
        weights: ``(B, T)``, renormalised to a mean of 1 over the tokens; 0 on padding.
        logs: What to log: ``gate/token_share`` and ``gate/rollout_share`` (of those with a weight above 0),
            ``gate/effective_share`` (Kish's effective number of tokens over their number: below ``token_share`` where
            weights differ), ``gate/loss_before`` (the mean over all tokens) and ``gate/loss_after``.
    """

    loss: Tensor
    weights: Tensor
    logs: dict[str, float]


def gate_loss(
    gate: Gate, losses: Tensor, mask: Tensor, tokens: Tokens | None = None, *, renormalise: bool = True
) -> GatedLoss:
    r"""Weigh per-token losses by a gate: the one call that a training step of your own needs.

    .. math:: L = \frac{\sum_i w_i \ell_i}{\sum_i w_i}

    so that the loss keeps its scale whatever share of the tokens is let through. Where a batch has no token with a
    weight, the loss is exactly 0 and so are its gradients: nothing is divided by 0, every parameter still takes part
    (which DDP needs), and the optimizer's momentum and weight decay act as ever.

    Args:
        gate: From tokens to weights.
        losses: ``(B, T)``, of each response token.
        mask: ``(B, T)``, 1 where there is a token.
        tokens: What is known of the tokens, in the order of ``losses[mask]``; None: depth and length only. See
            :func:`tokens_of`, and :meth:`Tokens.with_policies`.
        renormalise: False divides by the number of tokens instead, so that a gate also lowers the loss.

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
    weights, there = weights.to(losses), mask.bool()
    # Chosen, not multiplied: an infinite loss behind a weight of 0 must not become NaN.
    loss = (weights * torch.where(weights > 0, losses, 0)).sum() / there.sum().clamp(min=1)
    logs |= {"gate/loss_before": float(losses.detach()[there].mean()), "gate/loss_after": float(loss.detach())}
    return GatedLoss(loss, weights, logs)


def gate_weights(
    gate: Gate, mask: Tensor, tokens: Tokens | None = None, *, renormalise: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """What each token of a padded batch weighs, for a loss that is a mean over tokens.

    Args:
        gate: From tokens to weights.
        mask: ``(B, T)``, 1 where there is a token.
        tokens: As in :func:`gate_loss`.
        renormalise: To a mean of 1 over the tokens; weights that are all 0 stay so.

    Returns:
        ``(B, T)``, float32 at least, 0 on padding; and what to log, see :class:`GatedLoss`.

    Raises:
        ValueError: If shapes do not fit, or a weight is negative or not finite.
    """
    there = mask.bool()
    tokens = tokens_of(there) if tokens is None else tokens
    count = int(there.sum())
    if len(tokens) != count:
        raise ValueError(f"`tokens` must hold the {count} tokens of `mask`, but holds {len(tokens)}.")
    raw = weigh(gate, tokens).to(mask.device)
    total = raw.sum()
    some = bool(total > 0)
    weights = raw.new_zeros(mask.shape).masked_scatter(there, raw * (count / total) if renormalise and some else raw)
    open_ = raw > 0
    rollouts = int(there.any(dim=1).sum())
    return weights, {
        "gate/token_share": float(open_.float().mean()),
        "gate/rollout_share": len(tokens.rollout[open_].unique()) / rollouts if rollouts else float("nan"),
        "gate/effective_share": float(total**2 / (raw.square().sum() * count)) if some else 0.0,
    }


def weigh(gate: Gate, tokens: Tokens) -> Tensor:
    """A gate's weights, checked: ``(N,)``, no gradient.

    Raises:
        ValueError: If their shape is wrong, or one is negative or not finite.
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
    """The same tokens, each with the teacher that the gate chooses, if it chooses.

    Raises:
        ValueError: If what it gives is no index of a teacher for each token.
    """
    if not isinstance(gate, Router):
        return tokens
    chosen = gate.route(tokens)
    if chosen.shape != (len(tokens),) or not bool(((chosen >= 0) & (chosen < len(tokens.teachers))).all()):
        raise ValueError(
            f"`gate` must route each of the {len(tokens)} tokens to one of {len(tokens.teachers)} teachers by its "
            f"index, but gave a tensor of shape {tuple(chosen.shape)}."
        )
    return replace(tokens, teacher=chosen)


def check_gate(gate: Gate, *, rewards: bool, policies: bool = True, teachers: tuple[str, ...] = ("teacher",)) -> None:
    """Try a gate on a few made-up tokens, before training.

    Args:
        gate: The gate.
        rewards: Whether training will know rewards.
        policies: Whether it will know both policies' logits.
        teachers: Names of the teachers.

    Raises:
        ValueError: If the gate needs what will not be known, or gives no proper weights.
    """
    if not callable(gate):
        raise ValueError(f"`gate` must be a function from tokens to weights, but {gate!r} was given.")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    tokens = tokens_of(mask, [1.0, 0.0] if rewards else None, ["a", "a"], teachers=teachers)
    if policies:
        logits = torch.linspace(-1, 1, 10).reshape(5, 2)
        tokens = tokens.with_policies(logits, -logits, torch.zeros(5, dtype=torch.long))
    weigh(gate, route(gate, tokens))
