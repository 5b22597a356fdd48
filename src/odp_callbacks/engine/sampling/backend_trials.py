"""Trials of the backends: a few tokens each, compared with the model's full forward pass.

:mod:`~odp_callbacks.engine.sampling.length_trials` tries the lengths that will be used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention import model_configs, using_shared_prefix_attention
from odp_callbacks.engine.sampling.model_forward import forward_with_cache
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache, extend_prefix_cache, prefill
from odp_callbacks.engine.sampling.repeated_cache import copy_prefixes
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.engine.sampling.shared_prefix import SharedPrefixView
from odp_callbacks.engine.sampling.suffix_cache import suffix_cache
from odp_callbacks.engine.sampling.trial_logits import check_logits, own_logits, random_sequences

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def try_shared_prefix(model: nn.Module) -> None:
    """Try prompts of unequal lengths, responses, and continuations that start at unequal places.

    Raises:
        NotImplementedError: If the model has layers that cannot share a prefix.
        ArithmeticError: If the logits differ from those of the full forward pass.
    """
    _check_layer_types(model)
    prompts, responses = random_sequences(model, (6, 3)), random_sequences(model, (5, 2, 4))
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
        _check_last_logits(model, sequence, logits[0])
    step_logits, view = forward_continuations(model, cache, requests)
    check_attention(model, cache, view)
    for row, request in enumerate(requests):
        prefix = sequences[request.sequence][: request.prefix_length]
        for step, logits in enumerate(step_logits):
            _check_last_logits(model, torch.cat([prefix, torch.tensor([1, 0][: step + 1])]), logits[row])


def _check_layer_types(model: nn.Module) -> None:
    layer_types = _layer_types(model)
    if unsupported := layer_types - SUPPORTED_LAYER_TYPES:
        raise NotImplementedError(f"layers of type {sorted(unsupported)} are not supported")


def _layer_types(model: nn.Module) -> set[str]:
    return {layer_type for config in model_configs(model) for layer_type in getattr(config, "layer_types", None) or ()}


def forward_continuations(
    model: nn.Module, cache: PrefixCache, requests: Sequence[ContinuationRequest], tokens: Sequence[int] = (1, 0)
) -> tuple[list[Tensor], SharedPrefixView]:
    """Run two steps with the given tokens in every row; return the logits ``(B, V)`` of each, and what was attended to.

    Args:
        model: The model.
        cache: Keys and values of the prefixes.
        requests: Where the rows start.
        tokens: The tokens of the two steps.
    """
    device = next(model.parameters()).device
    step_logits = []
    with torch.no_grad(), using_shared_prefix_attention(model):
        view = cache.shared_prefix_view(requests, device, 2)
        suffixes = suffix_cache(len(requests), 2, view)
        for step in range(2):
            position_ids = (view.prefix_lengths + view.suffix_lengths)[:, None]
            input_ids = torch.full((len(requests), 1), tokens[step], device=device)
            logits = forward_with_cache(model, input_ids, suffixes, position_ids=position_ids, shared_prefix=view)
            step_logits.append(logits[:, -1])
            view.set_suffix_lengths(view.suffix_lengths + 1, step + 1, True)
    return step_logits, view


def check_attention(model: nn.Module, cache: PrefixCache, view: SharedPrefixView) -> None:
    """Check that all layers attended to the shared prefix, and asked for their windows, which may be longer than it.

    Args:
        model: The model.
        cache: Keys and values of the prefixes.
        view: What the rows shared, after a forward pass.

    Raises:
        NotImplementedError: If a layer did not.
    """
    if missing := set(range(len(cache.prompt_layers))) - view.attended_layers:
        raise NotImplementedError(f"layer {min(missing)} does not attend through transformers' attention interface")
    windows = {
        window
        for window in (getattr(config, "sliding_window", None) for config in model_configs(model))
        if isinstance(window, int) and window > 0
    }
    layer_types = _layer_types(model)
    has_sliding_layers = not layer_types or "sliding_attention" in layer_types
    if has_sliding_layers and not windows <= view.windows:
        raise NotImplementedError("a sliding window is not passed to the attention function")


def try_repeated_cache(model: nn.Module) -> None:
    """Try rows on copies of a cache, aligned right.

    Raises:
        ArithmeticError: If the logits differ from those of the full forward pass.
    """
    device = next(model.parameters()).device
    sequences = random_sequences(model, (6, 3))
    lengths = torch.tensor([5, 2], device=device)
    with torch.no_grad():
        cache, attention_mask = copy_prefixes(prefill(model, sequences), torch.tensor([0, 1], device=device), lengths)
        input_ids = torch.ones(2, 1, dtype=torch.long, device=device)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(2, 1)], dim=1)
        logits = forward_with_cache(
            model, input_ids, cache, attention_mask=attention_mask, position_ids=lengths[:, None]
        )
    for row, length in enumerate(lengths.tolist()):
        _check_last_logits(model, torch.cat([sequences[row][:length], torch.tensor([1])]), logits[row, -1])


def try_generate(model: nn.Module) -> None:
    """Try transformers' ``generate`` on two sequences.

    Raises:
        ArithmeticError: If the logits that it samples from differ from those of the full forward pass.
    """
    check_generated(model, torch.stack(random_sequences(model, (6, 6))))


def check_generated(model: nn.Module, input_ids: Tensor) -> None:
    """Raise ``ArithmeticError`` unless ``generate`` samples three tokens from the model's own logits.

    Args:
        model: The model.
        input_ids: ``(B, T)`` int64.
    """
    # Imported here because its module needs transformers, whose import takes seconds.
    from odp_callbacks.engine.sampling.generate import generated_logits

    output_ids, step_logits = generated_logits(model, input_ids, 3)
    for row, sequence in enumerate(output_ids):
        for step, logits in enumerate(step_logits):
            _check_last_logits(model, sequence[: input_ids.shape[1] + step], logits[row])


def _check_last_logits(model: nn.Module, input_ids: Tensor, logits: Tensor) -> None:
    """Raise ``ArithmeticError`` unless ``logits``, ``(V,)``, are those of the full forward pass after ``input_ids``."""
    check_logits(model, own_logits(model, input_ids, [len(input_ids) - 1]), logits[None])
