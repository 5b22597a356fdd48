"""Log-probabilities of responses under a student, also under earlier values of its LoRA parameters."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.update.split_model import Parameters, SplitModel
from odp_callbacks.functional.policies import token_log_probs

MAXIMUM_LOGITS = 2**23
"""Logits that are held at a time."""
BATCH_TOKENS = {"cpu": 2048}
"""Prompt and response tokens that go through the model at a time."""
BATCH_TOKENS_ELSEWHERE = 32768


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
    found: dict[int, Tensor] = {}
    for batch in _batches(rollouts, BATCH_TOKENS.get(device.type, BATCH_TOKENS_ELSEWHERE)):
        chosen = [rollouts[index] for index in batch]
        positions = [rollout.positions(range(len(rollout.response_ids))) for rollout in chosen]
        hidden = model.hidden_states([rollout.sequence[:-1] for rollout in chosen], positions, parameters)
        tokens = torch.tensor([token for rollout in chosen for token in rollout.response_ids], device=hidden.device)
        log_probs = _log_probs_of_tokens(model, hidden, tokens, temperature, parameters)
        found.update(zip(batch, log_probs.split([len(rollout.response_ids) for rollout in chosen]), strict=True))
    return [found[index] for index in range(len(rollouts))]


def _log_probs_of_tokens(
    model: SplitModel, hidden: Tensor, tokens: Tensor, temperature: float, parameters: Parameters
) -> Tensor:
    """``(N,)`` float64 on the CPU, for hidden states ``(N, H)`` and the tokens ``(N,)`` that were chosen there."""
    size = max(1, MAXIMUM_LOGITS // vocabulary_size(model.model))
    parts = []
    for states, chosen in zip(hidden.split(size), tokens.split(size), strict=True):
        logits = model.logits(states, parameters)  # (n, V)
        parts.append(token_log_probs(logits, chosen, temperature).double().cpu())
    return torch.cat(parts)


def _batches(rollouts: Sequence[Rollout], limit: int) -> Iterator[list[int]]:
    """Indices of rollouts of similar length that go through the model together."""
    lengths = [len(rollout.question.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
    batch: list[int] = []
    for index in sorted(range(len(rollouts)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
