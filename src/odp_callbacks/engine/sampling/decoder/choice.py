"""Whether the logits of a model's continuations can be computed with few operator calls, by a comparison at the start.

Before every stream of continuations, a few steps are compared with the forward pass of the model: on prefixes of this
stream, in the model's own precision, also at the last position that a continuation may reach. A model in half precision
is compared once in float32 as well.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention_arguments import AttentionArguments, attention_arguments
from odp_callbacks.engine.sampling.decoder.forward import DecoderSlots
from odp_callbacks.engine.sampling.decoder.layers import DecoderParts, LlamaLikeModel
from odp_callbacks.engine.sampling.decoder.ragged_attention import can_attend_by_table
from odp_callbacks.engine.sampling.exact_arithmetic import HALF_PRECISION, computes_exactly, exact_arithmetic
from odp_callbacks.engine.sampling.model_slots import ModelSlots, Slots
from odp_callbacks.engine.sampling.prefix_cache import PrefixCache, extend_prefix_cache, prefill
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.engine.sampling.rotary_state import preserving_rotary_state
from odp_callbacks.engine.sampling.trial_logits import check_logits, random_sequences

LOGGER = logging.getLogger(__name__)
TRIAL_STEPS = 2
MOST_TRIAL_SEQUENCES = 3
USABLE_SHARE = 0.5
"""Share of the memory that is left for continuations which copies of weights may take."""


class DecoderChoice(NamedTuple):
    """How the logits of continuations are computed.

    Attributes:
        parts: The model's weights; None: by its forward pass.
        reason: Why not with few calls; empty where they are.
        copied_bytes: Bytes of the weights that were copied.
        by_table: Whether one kernel attends for all slots.
    """

    parts: DecoderParts | None
    reason: str = ""
    copied_bytes: int = 0
    by_table: bool = False

    def slots(self, model: nn.Module, cache: PrefixCache, capacity: int) -> Slots:
        """Make the slots of a batch.

        Args:
            model: The student in evaluation mode.
            cache: Keys and values of the prefixes.
            capacity: The largest number of tokens of a suffix.
        """
        if self.parts is None:
            return ModelSlots(model, capacity)
        return DecoderSlots(self.parts, cache, capacity, by_table=self.by_table)


class _Known:
    """What is known of a model."""

    def __init__(self, attention: dict[int, AttentionArguments]) -> None:
        self.attention = attention
        self.exact_failures: dict[bool, str] = {}


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def choose_decoder(model: nn.Module, cache: PrefixCache, longest: int, usable_bytes: int) -> DecoderChoice:
    """Put the weights of a model together, and compare a few steps with its forward pass.

    Args:
        model: The student in evaluation mode; it must attend through transformers' attention interface.
        cache: Keys and values of the prefixes that continuations will start from.
        longest: The largest number of tokens of a prefix and its continuation.
        usable_bytes: What continuations may use; copies of weights take at most half of it.

    Returns:
        The weights, or why the model's own forward pass serves.
    """
    try:
        with torch.no_grad(), preserving_rotary_state(model):
            return _choose(model, cache, longest, usable_bytes)
    except Exception as error:  # whatever fails, the model's own forward pass serves
        return DecoderChoice(None, str(error) or type(error).__name__)


def _choose(model: nn.Module, cache: PrefixCache, longest: int, usable_bytes: int) -> DecoderChoice:
    if not cache.prompt_layers and not cache.response_layers:
        raise NotImplementedError("there is no prefix")
    reading = LlamaLikeModel(model)
    if model not in _KNOWN:
        _KNOWN[model] = _Known(attention_arguments(model))
    known = _KNOWN[model]
    # Under autocast, keys and values have the dtype in which the layers compute, and weights have another.
    dtype = (cache.prompt_layers or cache.response_layers)[0][1].dtype
    merge = dtype not in HALF_PRECISION and reading.copied_bytes(dtype, merge=True) <= USABLE_SHARE * usable_bytes
    copied_bytes = reading.copied_bytes(dtype, merge=merge)
    if copied_bytes > USABLE_SHARE * usable_bytes:
        raise NotImplementedError(f"copies of weights would take {copied_bytes / 2**30:.1f} GiB")
    parts = reading.parts(known.attention, dtype, merge=merge)
    if can_attend_by_table(parts.device, dtype):
        try:
            _compare(model, known, parts, cache, longest, by_table=True)
        except Exception as error:  # whatever fails, attention by blocks serves
            LOGGER.debug("The kernel for ragged attention is not used: %s", error)
        else:
            return DecoderChoice(parts, "", copied_bytes, by_table=True)
    _compare(model, known, parts, cache, longest, by_table=False)
    return DecoderChoice(parts, "", copied_bytes)


def _compare(
    model: nn.Module, known: _Known, parts: DecoderParts, cache: PrefixCache, longest: int, *, by_table: bool
) -> None:
    """Compare some steps on the prefixes, and in half precision once in float32; raise ``ArithmeticError``."""
    if not computes_exactly(model):
        if by_table not in known.exact_failures:
            known.exact_failures[by_table] = _failure(lambda: _try_exactly(model, known.attention, by_table))
        if known.exact_failures[by_table]:
            raise ArithmeticError(known.exact_failures[by_table])
    compare_steps(model, parts, cache, longest, by_table=by_table)


def _try_exactly(model: nn.Module, attention: dict[int, AttentionArguments], by_table: bool) -> None:
    """Compare a few tokens in float32: in half precision, rounding would hide what is wrong."""
    with exact_arithmetic(model):
        prompts, responses = random_sequences(model, (6, 3)), random_sequences(model, (5, 2, 4))
        cache, _ = extend_prefix_cache(model, prefill(model, prompts), responses, (0, 0, 1))
        dtype = cache.prompt_layers[0][1].dtype
        parts = LlamaLikeModel(model).parts(attention, dtype, merge=False)
        compare_steps(model, parts, cache, 16, by_table=by_table)


def _failure(trial: Callable[[], None]) -> str:
    try:
        trial()
    except ArithmeticError as error:
        return str(error)
    return ""


@torch.no_grad()
def compare_steps(
    model: nn.Module, parts: DecoderParts, cache: PrefixCache, longest: int, *, by_table: bool = False
) -> None:
    """Compare some steps of some slots with the forward pass of the model.

    Args:
        model: The student in evaluation mode.
        parts: Its weights.
        cache: Keys and values of prefixes.
        longest: The last step is at the position of this many tokens.
        by_table: Whether one kernel attends for all slots.

    Raises:
        ArithmeticError: If the logits differ.
    """
    requests = _trial_requests(cache)
    device = next(model.parameters()).device
    tokens = torch.stack(random_sequences(model, [TRIAL_STEPS] * len(requests)), dim=1).to(device)  # (steps, B)
    by_model = _step_logits(ModelSlots(model, TRIAL_STEPS), cache, requests, tokens, longest)
    by_decoder = _step_logits(
        DecoderSlots(parts, cache, TRIAL_STEPS, by_table=by_table), cache, requests, tokens, longest
    )
    check_logits(model, torch.cat(by_model), torch.cat(by_decoder))


def _trial_requests(cache: PrefixCache) -> list[ContinuationRequest]:
    """Requests in the middle and at the end of the shortest, the longest and the last sequence."""
    responses = cache.response_lengths if cache.response_layers else (0,) * len(cache.prompt_of_sequence)
    prompts = [cache.prompt_lengths[prompt] for prompt in cache.prompt_of_sequence]
    lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(lengths)), key=lambda sequence: lengths[sequence])
    chosen = list(dict.fromkeys([order[-1], order[0], len(lengths) - 1]))[:MOST_TRIAL_SEQUENCES]
    return [
        ContinuationRequest(sequence, prefix_length, 0, TRIAL_STEPS)
        for sequence in chosen
        for prefix_length in (lengths[sequence], (prompts[sequence] + lengths[sequence]) // 2)
    ]


def _step_logits(
    slots: Slots, cache: PrefixCache, requests: list[ContinuationRequest], tokens: Tensor, longest: int
) -> list[Tensor]:
    """Logits ``(B, V)`` of each step."""
    view = cache.shared_prefix_view(requests, tokens.device, TRIAL_STEPS)
    slots.set_row_count(len(requests))
    slots.set_view(view)
    all_logits = []
    for step in range(TRIAL_STEPS):
        positions = view.prefix_lengths + step
        if step == TRIAL_STEPS - 1:
            # Some models scale what they compute by the position.
            positions = positions.clamp(min=longest - 1)
        all_logits.append(slots.logits(tokens[step], positions).clone())
        view.set_suffix_lengths(view.suffix_lengths + 1, step + 1, True)
    return all_logits
