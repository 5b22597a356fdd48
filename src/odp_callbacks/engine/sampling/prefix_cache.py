"""Keys and values of prefixes that many sequences share: those of each prompt once, and of each response once.

They form a tree of two levels. A continuation of a rollout reads its prompt's keys and values, those of the response
up to its node, and those of its own suffix (:mod:`odp_callbacks.engine.sampling.attention`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from odp_callbacks.engine.sampling.attention import using_shared_prefix_attention
from odp_callbacks.engine.sampling.model_forward import forward_with_cache, vocabulary_size
from odp_callbacks.engine.sampling.requests import ContinuationRequest
from odp_callbacks.engine.sampling.shared_prefix import KeyValueLayers, SharedLevel, SharedPrefixView
from odp_callbacks.engine.sampling.suffix_cache import suffix_cache

if TYPE_CHECKING:
    from transformers import Cache

MAX_TOKENS_PER_BATCH = 8192
"""The largest number of response tokens, padding included, that go through the model in one forward pass."""


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of ``S`` sequences, each a prompt with or without a response.

    Attributes:
        prompt_layers: Keys and values of ``Q`` prompts, ``(Q, H, T, D)`` in each layer, padded on the right.
        prompt_lengths: ``Q``, tokens of each prompt.
        response_layers: Keys and values of ``S`` responses, ``(S, H, T', D)`` in each layer, padded on the right;
            empty where the sequences are the prompts.
        response_lengths: ``S``, tokens of each response; 0 where the sequences are the prompts.
        prompt_of_sequence: ``S``, the index of each sequence's prompt.
    """

    prompt_layers: KeyValueLayers
    prompt_lengths: tuple[int, ...]
    response_layers: KeyValueLayers
    response_lengths: tuple[int, ...]
    prompt_of_sequence: tuple[int, ...]

    def shared_prefix_view(
        self, requests: Sequence[ContinuationRequest], device: torch.device, longest_suffix: int
    ) -> SharedPrefixView:
        """Describe what the rows of a batch share; their suffixes are empty.

        Args:
            requests: One for each row.
            device: Where the model is.
            longest_suffix: The largest number of tokens that a row's suffix will have.
        """
        prompts = [self.prompt_of_sequence[request.sequence] for request in requests]
        prompt_lengths = [self.prompt_lengths[prompt] for prompt in prompts]
        prefix_lengths = [request.prefix_length for request in requests]
        sorted_rows = sorted(
            range(len(requests)), key=lambda row: (prompts[row], requests[row].sequence, prefix_lengths[row])
        )
        levels = []
        if self.prompt_layers:
            sequences = [prompts[row] for row in sorted_rows]
            read_lengths = [min(prefix_lengths[row], prompt_lengths[row]) for row in sorted_rows]
            levels.append(
                SharedLevel.from_reads(self.prompt_layers, sequences, read_lengths, [0] * len(sorted_rows), device)
            )
        if self.response_layers:
            sequences = [requests[row].sequence for row in sorted_rows]
            read_lengths = [max(0, prefix_lengths[row] - prompt_lengths[row]) for row in sorted_rows]
            offsets = [prompt_lengths[row] for row in sorted_rows]
            levels.append(SharedLevel.from_reads(self.response_layers, sequences, read_lengths, offsets, device))
        order = torch.tensor(sorted_rows, device=device)
        return SharedPrefixView(
            levels=[level for level in levels if level.groups],
            order=order,
            inverse_order=torch.argsort(order),
            prefix_lengths=torch.tensor(prefix_lengths, device=device),
            suffix_lengths=torch.zeros(len(requests), dtype=torch.long, device=device),
            longest_suffix=0,
            equal_lengths=True,
            max_position=max(prefix_lengths) + longest_suffix,
        )


def prefill(model: nn.Module, sequences: Sequence[Tensor], parameters: dict[str, Tensor] | None = None) -> PrefixCache:
    """Run ``model`` once over sequences and keep their keys and values.

    Args:
        model: Causal language model that takes a transformers cache.
        sequences: ``(T_s,)`` int64 each, without padding.
        parameters: Replacements for parameters of ``model``, by name.

    Returns:
        A cache in which each sequence is a prompt.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    lengths = [len(sequence) for sequence in sequences]
    # Padded on the right: positions count from 0, and what follows the end of a sequence is never read.
    input_ids = pad_sequence([sequence.cpu() for sequence in sequences], batch_first=True)
    attention_mask = (torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    cache = DynamicCache()
    if input_ids.shape[1]:
        forward_with_cache(
            model, input_ids.to(device), cache, attention_mask=attention_mask.to(device), parameters=parameters
        )
    layers = [(layer.keys.to(layer.values.dtype), layer.values) for layer in cache.layers]
    return PrefixCache(layers, tuple(lengths), [], (0,) * len(lengths), tuple(range(len(lengths))))


def extend_prefix_cache(
    model: nn.Module,
    prompts: PrefixCache,
    responses: Sequence[Tensor],
    prompt_of_sequence: Sequence[int],
    logit_positions: Sequence[Sequence[int]] | None = None,
    parameters: dict[str, Tensor] | None = None,
    max_logits: int = 2**26,
) -> tuple[PrefixCache, list[Tensor]]:
    """Add responses to their prompts, with forward passes over the responses only.

    Args:
        model: The model that prefilled the prompts.
        prompts: From :func:`prefill`.
        responses: ``(T_s,)`` int64 each, the tokens after the prompt.
        prompt_of_sequence: For each response, the index of its prompt.
        logit_positions: For each response, ``N_s`` indices into its tokens whose logits are returned; None for no
            logits.
        parameters: Replacements for parameters of ``model``, by name.
        max_logits: The largest number of logits to hold at a time.

    Returns:
        The cache of prompts and responses, and logits ``(N_s, V)`` for each response; an empty list without
        ``logit_positions``.
    """
    lengths = tuple(len(response) for response in responses)
    response_layers: KeyValueLayers = []
    logits: list[Tensor] = []
    with using_shared_prefix_attention(model):
        for first_row, stop_row in _batches(lengths, logit_positions, vocabulary_size(model), max_logits):
            batch_positions = None if logit_positions is None else logit_positions[first_row:stop_row]
            suffixes, batch_logits = _forward_responses(
                model,
                prompts,
                responses[first_row:stop_row],
                prompt_of_sequence[first_row:stop_row],
                batch_positions,
                parameters,
            )
            logits += batch_logits
            if not response_layers:
                response_layers = _allocate_layers(suffixes, len(responses), max(lengths))
            for (keys, values), layer in zip(response_layers, suffixes.layers, strict=True):
                batch_length = layer.keys.shape[2]
                keys[first_row:stop_row, :, :batch_length] = layer.keys
                values[first_row:stop_row, :, :batch_length] = layer.values
    cache = PrefixCache(
        prompts.prompt_layers, prompts.prompt_lengths, response_layers, lengths, tuple(prompt_of_sequence)
    )
    return cache, logits


def _forward_responses(
    model: nn.Module,
    prompts: PrefixCache,
    responses: Sequence[Tensor],
    prompt_of_sequence: Sequence[int],
    logit_positions: Sequence[Sequence[int]] | None,
    parameters: dict[str, Tensor] | None,
) -> "tuple[Cache, list[Tensor]]":
    """Run ``model`` over one batch of responses; the arguments are those of :func:`extend_prefix_cache`.

    Returns:
        The keys and values of the responses, and logits ``(N_s, V)`` for each.
    """
    device = next(model.parameters()).device
    input_ids = pad_sequence([response.cpu() for response in responses], batch_first=True).to(device)
    row_count, longest = input_ids.shape
    # A response starts where its prompt ends. The token and the limit of these requests are not used.
    requests = [ContinuationRequest(prompt, prompts.prompt_lengths[prompt], 0, 1) for prompt in prompt_of_sequence]
    view = prompts.shared_prefix_view(requests, device, longest)
    cache = suffix_cache(row_count, longest, view)
    position_ids = view.prefix_lengths[:, None] + torch.arange(longest, device=device)
    wanted = sorted({position for positions in logit_positions or () for position in positions})
    logits = forward_with_cache(
        model,
        input_ids,
        cache,
        position_ids=position_ids,
        shared_prefix=view,
        logit_positions=torch.tensor(wanted, device=device) if wanted else None,
        parameters=parameters,
    )
    if logit_positions is None:
        return cache, []
    column = {position: index for index, position in enumerate(wanted)}
    # Copies, so that the logits of the whole batch are freed.
    return cache, [
        logits[row, [column[position] for position in positions]].clone()
        for row, positions in enumerate(logit_positions)
    ]


def _allocate_layers(example: "Cache", row_count: int, length: int) -> KeyValueLayers:
    """Allocate keys and values for all responses, like those of one batch of them."""
    layers: KeyValueLayers = []
    for layer in example.layers:
        # Keys get the dtype of the values: under autocast they may have been computed in float32.
        keys, values = (
            layer.values.new_zeros(row_count, states.shape[1], length, states.shape[3])
            for states in (layer.keys, layer.values)
        )
        layers.append((keys, values))
    return layers


def _batches(
    lengths: Sequence[int],
    logit_positions: Sequence[Sequence[int]] | None,
    vocabulary: int,
    max_logits: int,
) -> list[tuple[int, int]]:
    """Split the responses into consecutive batches whose logits and activations are small enough.

    A batch computes logits at the union of its rows' positions.
    """
    batches: list[tuple[int, int]] = []
    first_row = 0
    batch_positions: set[int] = set()
    for row in range(len(lengths)):
        own_positions = set(logit_positions[row] if logit_positions is not None else ())
        batch_positions |= own_positions
        row_count = row - first_row + 1
        if row_count > 1 and (
            row_count * len(batch_positions) * vocabulary > max_logits
            or row_count * max(lengths[first_row : row + 1]) > MAX_TOKENS_PER_BATCH
        ):
            batches.append((first_row, row))
            first_row, batch_positions = row, own_positions
    if lengths:
        batches.append((first_row, len(lengths)))
    return batches
