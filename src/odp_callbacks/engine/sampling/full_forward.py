"""The backend "full forward": a forward pass over all tokens for each sampled one, for every model.

It serves models whose attention depends on the total length of the sequence, such as those with long-rope or dynamic
scaling of their positions: keys that were computed in a shorter sequence are not those of a longer one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.categorical import check_probabilities, sample_tokens
from odp_callbacks.engine.sampling.randomness import as_key_tensor, uniforms
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, stacked_prefixes
from odp_callbacks.engine.sampling.rotary_state import dynamic_rotaries, forget_lengths
from odp_callbacks.functional.gradients import logits_at


def sample_with_full_forward(
    model: nn.Module,
    sequences: Sequence[Tensor],
    requests: Sequence[ContinuationRequest],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int],
    deadline: Deadline | None = None,
) -> list[Continuation]:
    """Sample one batch of continuations of equally long prefixes, and run all tokens again for each new one.

    Args:
        model: The student, in evaluation mode.
        sequences: ``(T_s,)`` int64 each.
        requests: Where each continuation starts; all have the same ``prefix_length``.
        temperature: Divides the logits.
        eos_token_ids: Tokens that end a response.
        keys: One for each request; the tokens of a continuation depend on its own key only.
        deadline: When to stop; continuations that have not finished by then are marked as such. None: no limit.

    Returns:
        Continuations in the order of ``requests``.

    Raises:
        FloatingPointError: If the model's logits do not define a distribution (NaN).
    """
    device = next(model.parameters()).device
    input_ids = stacked_prefixes(sequences, requests, device)  # (B, T)
    max_lengths = torch.tensor([request.max_new_tokens for request in requests], device=device)
    end_tokens = torch.tensor(list(eos_token_ids), device=device, dtype=torch.long)
    key_tensor = as_key_tensor(keys, device)
    rows = torch.arange(len(requests), device=device)
    rotaries = dynamic_rotaries(model)
    sampled: list[list[int]] = [[] for _ in requests]
    ended = [False] * len(requests)
    step = 0
    while len(rows):
        forget_lengths(rotaries)
        last = torch.tensor([input_ids.shape[1] - 1], device=device)
        logits = logits_at(model, input_ids, last)[:, 0]  # (B, V)
        draws = uniforms(key_tensor[rows], torch.full_like(rows, step), 2)
        tokens, valid = sample_tokens(logits, temperature, draws)
        check_probabilities(valid)
        step += 1
        has_ended = torch.isin(tokens, end_tokens)
        for row, token, end in zip(rows.tolist(), tokens.tolist(), has_ended.tolist(), strict=True):
            sampled[row].append(token)
            ended[row] = end
        running = ~has_ended & (step < max_lengths[rows])
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)[running]
        rows = rows[running]
        if deadline is not None and len(rows):
            deadline.reserve_for(len(rows))
            if deadline.has_passed:
                break
    unfinished = set(rows.tolist())
    return [
        Continuation(tuple(tokens), not end, row in unfinished)
        for row, (tokens, end) in enumerate(zip(sampled, ended, strict=True))
    ]
