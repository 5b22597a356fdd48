"""The backend "generate": transformers' own ``generate``, for models with another kind of cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.categorical import check_probabilities, sample_tokens
from odp_callbacks.engine.sampling.randomness import as_key_tensor, uniforms
from odp_callbacks.engine.sampling.requests import Continuation, ContinuationRequest, stacked_prefixes


def sample_with_generate(
    model: Any,
    sequences: Sequence[Tensor],
    requests: Sequence[ContinuationRequest],
    *,
    temperature: float,
    eos_token_ids: Sequence[int],
    keys: Sequence[int],
    deadline: Deadline | None = None,
) -> list[Continuation]:
    """Sample one batch of continuations of equally long prefixes, and run each prefix from its first token.

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
    prefix_length = input_ids.shape[1]
    generation_config = GenerationConfig(
        do_sample=False,  # `_KeyedSampling` leaves one token to choose from
        max_new_tokens=max(request.max_new_tokens for request in requests),
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
    )
    sampling = _KeyedSampling(as_key_tensor(keys, device), prefix_length, temperature)
    with _using_generation_config(model, generation_config):
        output_ids = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([sampling]),
            stopping_criteria=StoppingCriteriaList([] if deadline is None else [_Deadline(deadline)]),
        )
    continuations = []
    for tokens, request in zip(output_ids[:, prefix_length:].tolist(), requests, strict=True):
        tokens = tokens[: request.max_new_tokens]
        end_index = next((index for index, token in enumerate(tokens) if token in eos_token_ids), None)
        if end_index is not None:
            tokens = tokens[: end_index + 1]
        unfinished = end_index is None and len(tokens) < request.max_new_tokens
        continuations.append(Continuation(tuple(tokens), end_index is None, unfinished))
    return continuations


def generated_logits(model: Any, input_ids: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
    """Generate the most likely tokens, and return the logits that ``generate`` chose them from.

    Args:
        model: The student, in evaluation mode.
        input_ids: ``(B, T)`` int64.
        count: How many tokens to generate.

    Returns:
        All tokens, ``(B, T + count)`` int64, and the logits ``(B, V)`` of each new one.
    """
    input_ids = input_ids.to(next(model.parameters()).device)
    generation_config = GenerationConfig(do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0)
    recording = _Recording()
    with torch.no_grad(), _using_generation_config(model, generation_config):
        output_ids: Tensor = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([recording]),
        )
    return output_ids, recording.step_logits


class _Deadline(StoppingCriteria):  # type: ignore[misc]  # untyped in transformers
    """Stop when a deadline has passed."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.deadline.reserve_for(len(input_ids))
        return torch.full((len(input_ids),), self.deadline.has_passed, device=input_ids.device, dtype=torch.bool)


class _Recording(LogitsProcessor):  # type: ignore[misc]  # untyped in transformers
    """Keep the logits of every step."""

    def __init__(self) -> None:
        self.step_logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step_logits.append(scores.clone())
        return scores


@contextmanager
def _using_generation_config(model: Any, generation_config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own configuration, whose settings ``generate`` would otherwise merge in."""
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    own_config, base_model.generation_config = base_model.generation_config, generation_config
    try:
        yield
    finally:
        base_model.generation_config = own_config


class _KeyedSampling(LogitsProcessor):  # type: ignore[misc]  # untyped in transformers
    """Make greedy decoding sample: give each row a score of 0 for the token that its key draws, and -inf for others."""

    def __init__(self, keys: Tensor, prefix_length: int, temperature: float) -> None:
        self.keys, self.prefix_length, self.temperature = keys, prefix_length, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = torch.full_like(self.keys, input_ids.shape[1] - self.prefix_length)
        tokens, valid = sample_tokens(scores, self.temperature, uniforms(self.keys, step, 2))
        check_probabilities(valid)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
