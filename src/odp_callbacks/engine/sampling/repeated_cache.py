"""The backend "repeated cache": each continuation starts from its own copy of its prefix's keys and values."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.categorical import check_probabilities, sample_tokens
from odp_callbacks.engine.sampling.model_forward import forward_with_cache
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache
from odp_callbacks.engine.sampling.randomness import as_key_tensor, uniforms
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest
from odp_callbacks.functional.gradients import forward_arguments

if TYPE_CHECKING:
    from transformers import DynamicCache


def sample_with_repeated_cache(
    model: nn.Module,
    prefixes: PrefixCache,
    requests: Sequence[ContinuationRequest],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int],
    deadline: Deadline | None = None,
) -> list[Continuation]:
    """Sample one batch of continuations, each on a copy of the part of its sequence's cache that it needs.

    Args:
        model: The student, in evaluation mode.
        prefixes: From :func:`~odp_callbacks.engine.sampling.prefix_cache.prefill`, with whole sequences as prompts.
        requests: Where each continuation starts.
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
    prefix_lengths = torch.tensor([request.prefix_length for request in requests], device=device)  # (B,)
    max_lengths = torch.tensor([request.max_new_tokens for request in requests], device=device)
    next_tokens = torch.tensor([request.first_token for request in requests], device=device)
    sequences = torch.tensor([request.sequence for request in requests], device=device)
    end_tokens = torch.tensor(list(eos_token_ids), device=device, dtype=torch.long)
    key_tensor = as_key_tensor(keys, device)
    cache, attention_mask = copy_prefixes(prefixes, sequences, prefix_lengths)
    sampled_tokens = torch.zeros(len(requests), int(max_lengths.max()), dtype=torch.long, device=device)
    lengths = torch.zeros_like(max_lengths)
    ended = torch.zeros_like(max_lengths, dtype=torch.bool)
    active_rows = torch.arange(len(requests), device=device)
    accepted_arguments = forward_arguments(model)
    unfinished: set[int] = set()
    for step in range(sampled_tokens.shape[1]):
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(active_rows), 1)], dim=1)
        logits = forward_with_cache(
            model,
            next_tokens[:, None],
            cache,
            attention_mask=attention_mask,
            position_ids=(prefix_lengths[active_rows] + step)[:, None],
            accepted_arguments=accepted_arguments,
        )[:, -1]  # (B, V)
        uniform_draws = uniforms(key_tensor[active_rows], torch.full_like(active_rows, step), 2)
        next_tokens, valid = sample_tokens(logits, temperature, uniform_draws)
        check_probabilities(valid)
        sampled_tokens[active_rows, step] = next_tokens
        lengths[active_rows] += 1
        ended[active_rows] = torch.isin(next_tokens, end_tokens)
        running = ~ended[active_rows] & (lengths[active_rows] < max_lengths[active_rows])
        if not running.any():
            break
        if deadline is not None:
            deadline.reserve_for(int(running.sum()))
            if deadline.has_passed:
                unfinished = set(active_rows[running].tolist())
                break
        if not running.all():
            # Finished rows are dropped, so that no step computes padding.
            kept_rows = running.nonzero().squeeze(1)
            cache.batch_select_indices(kept_rows)
            attention_mask, next_tokens = attention_mask[kept_rows], next_tokens[kept_rows]
            active_rows = active_rows[kept_rows]
    return [
        Continuation(tuple(tokens[:length]), not has_ended, row in unfinished)
        for row, (tokens, length, has_ended) in enumerate(
            zip(sampled_tokens.tolist(), lengths.tolist(), ended.tolist(), strict=True)
        )
    ]


def copy_prefixes(prefixes: PrefixCache, sequences: Tensor, lengths: Tensor) -> "tuple[DynamicCache, Tensor]":
    """Copy the first positions of sequences into a new cache, aligned right.

    Because of the alignment, the distance between two positions in the cache is their distance in the text. Sliding
    windows, which transformers cuts by the former, therefore stay exact.

    Args:
        prefixes: Whole sequences as prompts.
        sequences: ``(B,)`` int64, the sequence that each row copies.
        lengths: ``(B,)`` int64, how many of its first positions each row copies.

    Returns:
        The cache, and its attention mask ``(B, T)`` int64.
    """
    from transformers import DynamicCache

    longest = int(lengths.max())
    columns = torch.arange(longest, device=sequences.device)
    positions = columns - (longest - lengths)[:, None]  # (B, T), in the sequence; negative on padding
    cache = DynamicCache()
    if longest:
        for layer_index, (keys, values) in enumerate(prefixes.prompt_layers):
            selection = (sequences[:, None], slice(None), positions.clamp(min=0))
            copied_keys, copied_values = (states[selection].transpose(1, 2) for states in (keys, values))
            cache.update(copied_keys, copied_values, layer_index)  # (B, H, T, D) each
    return cache, (positions >= 0).long()
