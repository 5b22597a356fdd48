"""Trials of the backends: a few tokens each, compared with the model's full forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention import model_configs, using_shared_prefix_attention
from odp_callbacks.engine.sampling.model_forward import forward_with_cache, vocabulary_size
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache, extend_prefix_cache, prefill
from odp_callbacks.engine.sampling.repeated_cache import copy_prefixes
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.engine.sampling.suffix_cache import suffix_cache

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
LOGIT_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest error of the logits, relative to the largest logit, by dtype."""
HALF_PRECISION_TOLERANCE = 0.1


def try_shared_prefix(model: nn.Module) -> None:
    """Try prompts of unequal lengths, responses, and continuations that start at unequal places.

    Raises:
        NotImplementedError: If the model has layers that cannot share a prefix.
        ArithmeticError: If the logits differ from those of the full forward pass.
    """
    _check_layer_types(model)
    prompts, responses = _random_sequences(model, (6, 3)), _random_sequences(model, (5, 2, 4))
    prompt_of_sequence = (0, 0, 1)
    sequences = [
        torch.cat([prompts[prompt], response]) for prompt, response in zip(prompt_of_sequence, responses, strict=True)
    ]
    requests = [
        ContinuationRequest(sequence, len(prompts[prompt_of_sequence[sequence]]) + depth, 1, 2)
        for sequence, depth in ((0, 5), (0, 2), (1, 1), (2, 3))
    ]
    last_positions = [[len(response) - 1] for response in responses]
    with torch.no_grad():
        prompt_cache = prefill(model, prompts)
        cache, response_logits = extend_prefix_cache(model, prompt_cache, responses, prompt_of_sequence, last_positions)
    for sequence, logits in zip(sequences, response_logits, strict=True):
        _check_logits(model, sequence, logits[0])
    step_logits, windows = _forward_continuations(model, cache, requests)
    _check_windows(model, windows)
    for row, request in enumerate(requests):
        prefix = sequences[request.sequence][: request.prefix_length]
        for step, logits in enumerate(step_logits):
            _check_logits(model, torch.cat([prefix, torch.tensor([1, 0][: step + 1])]), logits[row])


def _check_layer_types(model: nn.Module) -> None:
    layer_types = _layer_types(model)
    if unsupported := layer_types - SUPPORTED_LAYER_TYPES:
        raise NotImplementedError(f"layers of type {sorted(unsupported)} are not supported")


def _layer_types(model: nn.Module) -> set[str]:
    return {layer_type for config in model_configs(model) for layer_type in getattr(config, "layer_types", None) or ()}


def _forward_continuations(
    model: nn.Module, cache: PrefixCache, requests: Sequence[ContinuationRequest]
) -> tuple[list[Tensor], set[int]]:
    """Run two steps, with tokens 1 and 0; return the logits ``(B, V)`` of each, and the windows that layers used."""
    device = next(model.parameters()).device
    step_logits = []
    with torch.no_grad(), using_shared_prefix_attention(model):
        view = cache.shared_prefix_view(requests, device, 2)
        suffixes = suffix_cache(len(requests), 2, view)
        for step in range(2):
            position_ids = (view.prefix_lengths + view.suffix_lengths)[:, None]
            input_ids = torch.full((len(requests), 1), 1 - step, device=device)
            logits = forward_with_cache(model, input_ids, suffixes, position_ids=position_ids, shared_prefix=view)
            step_logits.append(logits[:, -1])
            view.set_suffix_lengths(view.suffix_lengths + 1, step + 1, True)
    return step_logits, view.windows


def _check_windows(model: nn.Module, used_windows: set[int]) -> None:
    """Check that the layers asked for their sliding windows, which are longer than this trial."""
    windows = {getattr(config, "sliding_window", None) for config in model_configs(model)} - {None, 0}
    layer_types = _layer_types(model)
    has_sliding_layers = not layer_types or "sliding_attention" in layer_types
    if has_sliding_layers and not windows <= used_windows:
        raise NotImplementedError("a sliding window is not passed to the attention function")


def try_repeated_cache(model: nn.Module) -> None:
    """Try rows on copies of a cache, aligned right.

    Raises:
        ArithmeticError: If the logits differ from those of the full forward pass.
    """
    device = next(model.parameters()).device
    sequences = _random_sequences(model, (6, 3))
    lengths = torch.tensor([5, 2], device=device)
    with torch.no_grad():
        cache, attention_mask = copy_prefixes(prefill(model, sequences), torch.tensor([0, 1], device=device), lengths)
        input_ids = torch.ones(2, 1, dtype=torch.long, device=device)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(2, 1)], dim=1)
        logits = forward_with_cache(
            model, input_ids, cache, attention_mask=attention_mask, position_ids=lengths[:, None]
        )
    for row, length in enumerate(lengths.tolist()):
        _check_logits(model, torch.cat([sequences[row][:length], torch.tensor([1])]), logits[row, -1])


def _check_logits(model: Callable[..., Any], input_ids: Tensor, logits: Tensor) -> None:
    """Raise an error unless ``logits`` are those of the full forward pass after ``input_ids``, up to rounding."""
    with torch.no_grad():
        expected = model(input_ids=input_ids[None].to(logits.device), use_cache=False).logits[0, -1]
    # Under autocast, logits in float32 may have been computed in half precision. Some families compute their softmax
    # in float32 whatever the dtype of the model, which the tolerance for float64 allows for.
    tolerance = LOGIT_TOLERANCES.get(expected.dtype, HALF_PRECISION_TOLERANCE)
    if torch.is_autocast_enabled(expected.device.type):
        tolerance = HALF_PRECISION_TOLERANCE
    error = float((expected - logits).abs().max() / (1 + expected.abs().max()))
    if not error <= tolerance:  # also for NaN
        raise ArithmeticError(f"its logits differ by {error:.1g} from those of the full forward pass")


def _random_sequences(model: nn.Module, lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    token_count = vocabulary_size(model)
    return [torch.randint(token_count, (length,), generator=generator) for length in lengths]
