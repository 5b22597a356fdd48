"""Log-probabilities of responses under a student, also under earlier values of its LoRA parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from odp_callbacks.engine.attention_plans import without_attention_plans
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.update.batches import batches_of_rollouts, useful_tokens
from odp_callbacks.engine.update.split_model import Parameters, SplitModel, logits_at_a_time
from odp_callbacks.functional.policies import token_log_probs


@without_attention_plans()
@torch.no_grad()
def response_log_probs(
    model: SplitModel, rollouts: Sequence[Rollout], temperature: float, parameters: Parameters = None
) -> list[Tensor]:
    """Compute the log-probability of each response token, in one forward pass over all rollouts.

    Rollouts of similar length share a batch, and logits exist only for some positions at a time.

    Args:
        model: The student in two parts, in evaluation mode.
        rollouts: Rollouts with at least one token each.
        temperature: Of the sampling.
        parameters: Other values of LoRA parameters by name; None for the student's own.

    Returns:
        For each rollout ``(T,)`` float64 on the CPU, in nats.
    """
    device = next(model.model.parameters()).device
    if parameters is not None:
        parameters = {name: value.to(device) for name, value in parameters.items()}
    numbers = range(len(rollouts))
    batches = batches_of_rollouts(
        rollouts,
        numbers,
        [0] * len(rollouts),
        [()] * len(rollouts),
        max_tokens=useful_tokens(device),
        max_segments=1,
    )
    of_rollout: dict[int, Tensor] = {}
    for batch in batches:
        chosen = [rollouts[index] for index in batch]
        positions = [rollout.positions(range(len(rollout.response_ids))) for rollout in chosen]
        hidden = model.hidden_states([rollout.sequence[:-1] for rollout in chosen], positions, parameters)
        tokens = torch.tensor([token for rollout in chosen for token in rollout.response_ids], device=hidden.device)
        log_probs = _log_probs_of_tokens(model, hidden, tokens, temperature, parameters)
        of_rollout.update(zip(batch, log_probs.split([len(rollout.response_ids) for rollout in chosen]), strict=True))
    return [of_rollout[number] for number in numbers]


def _log_probs_of_tokens(
    model: SplitModel, hidden: Tensor, tokens: Tensor, temperature: float, parameters: Parameters
) -> Tensor:
    """``(N,)`` float64 on the CPU, for hidden states ``(N, H)`` and the tokens ``(N,)`` that were chosen there."""
    size = max(1, logits_at_a_time(hidden.device) // vocabulary_size(model.model))
    parts = []
    for states, chosen in zip(hidden.split(size), tokens.split(size), strict=True):
        logits = model.logits(states, parameters)  # (n, V)
        parts.append(token_log_probs(logits, chosen, temperature).double().cpu())
    return torch.cat(parts)
