"""Logits at chosen positions of sequences, without computing or storing those of other positions."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from odp_callbacks.engine.attention_plans import without_attention_plans
from odp_callbacks.engine.gradients.float32_head import float32_head
from odp_callbacks.engine.sampling.backend_selection import BACKENDS, backend_of, depends_on_length, independent_groups
from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.engine.sampling.prefix_cache import extend_prefix_cache, prefill
from odp_callbacks.engine.sampling.rotary_state import dynamic_rotaries, forget_lengths
from odp_callbacks.functional.gradients import logits_at


@without_attention_plans()
def node_logits(
    model: nn.Module,
    sequences: Sequence[Tensor],
    positions: Sequence[Sequence[int]],
    parameters: dict[str, Tensor] | None = None,
    max_elements: int = 2**26,
) -> list[Tensor]:
    """Logits at chosen positions of each sequence, in padded batches, with gradients if they are enabled.

    Where a model's logits depend on the total length, those of a position are of the sequence that ends there, as they
    were when the next token was sampled.

    Args:
        model: Causal language model, in the mode that the caller wants.
        sequences: ``(T_s,)`` int64 each.
        positions: The positions of each sequence.
        parameters: Replacements for parameters of ``model``, by name.
        max_elements: Numbers in the logits of one batch, at most.

    Returns:
        ``(N_s, V)`` for each sequence.
    """
    device = next(model.parameters()).device
    all_logits: list[Tensor] = []
    shortest = min((min(of_sequence) + 1 for of_sequence in positions if of_sequence), default=1)
    if sequences and depends_on_length(model, shortest, max(map(len, sequences))):
        return [
            logits_of_prefixes(model, sequence.to(device), of_sequence, parameters)
            for sequence, of_sequence in zip(sequences, positions, strict=True)
        ]
    for first, last in _batches(positions, vocabulary_size(model), max_elements):
        batch, batch_positions = sequences[first:last], positions[first:last]
        # Every sequence of the batch is read at the positions of all of them.
        common_positions = sorted({position for of_sequence in batch_positions for position in of_sequence})
        lengths = torch.tensor([len(sequence) for sequence in batch])
        input_ids = pad_sequence([sequence.cpu() for sequence in batch], batch_first=True)
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        kept_positions = torch.tensor(common_positions, device=device)
        logits = logits_at(
            model, input_ids.to(device), kept_positions, attention_mask.to(device), parameters
        )  # (B, N, V)
        columns = {position: column for column, position in enumerate(common_positions)}
        all_logits += [
            logits[row_index, [columns[position] for position in of_sequence]]
            for row_index, of_sequence in enumerate(batch_positions)
        ]
    return all_logits


def logits_of_prefixes(
    model: nn.Module, input_ids: Tensor, positions: Sequence[int], parameters: dict[str, Tensor] | None = None
) -> Tensor:
    """Logits at the ends of prefixes of one sequence, each in a forward pass that gives what the prefix alone does.

    Args:
        model: Causal language model, in the mode that the caller wants.
        input_ids: ``(T,)`` int64, on the model's device.
        positions: ``N`` positions.
        parameters: Replacements for parameters of ``model``, by name.

    Returns:
        ``(N, V)``.
    """
    rotaries = dynamic_rotaries(model)
    rows: dict[int, Tensor] = {}
    for group in independent_groups(model, [position + 1 for position in positions]):
        forget_lengths(rotaries)
        of_group = [positions[index] for index in group]
        logits = logits_at(
            model, input_ids[None, : of_group[-1] + 1], input_ids.new_tensor(of_group), parameters=parameters
        )[0]
        rows.update(zip(group, logits, strict=True))
    return torch.stack([rows[index] for index in range(len(positions))])


def response_logits(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
    parameters: dict[str, Tensor] | None = None,
) -> list[Tensor]:
    """Logits at chosen depths of responses; the keys and values of equal prompts are computed once.

    The logits of the student and of every teacher are computed by this function, so those of a teacher that equals
    the student are bit-identical to the student's. The head's product is computed in float32 at least
    (:func:`~odp_callbacks.engine.gradients.float32_head.float32_head`).

    Args:
        model: Causal language model, in the mode that the caller wants.
        prompts: ``(P_r,)`` int64 for each response.
        responses: The tokens of each response.
        depths: ``N_r`` depths for each response.
        parameters: Replacements for parameters of ``model``, by name.

    Returns:
        ``(N_r, V)`` for each response.
    """
    if not responses:
        return []
    prefixes = [
        torch.tensor(list(response[: max(of_response)]), dtype=torch.long)
        for response, of_response in zip(responses, depths, strict=True)
    ]
    shortest = min(len(prompt) for prompt in prompts) - 1
    longest = max(len(prompt) + len(prefix) for prompt, prefix in zip(prompts, prefixes, strict=True))
    if backend_of(model, shortest, longest) == BACKENDS[0]:
        distinct_prompts = list(dict.fromkeys(tuple(prompt.tolist()) for prompt in prompts))
        prompt_indices = {prompt_tokens: prompt_index for prompt_index, prompt_tokens in enumerate(distinct_prompts)}
        # A prompt's last token belongs to the response, because its logits choose the first response token.
        prompt_cache = prefill(
            model,
            [torch.tensor(prompt_tokens[:-1], dtype=torch.long) for prompt_tokens in distinct_prompts],
            parameters,
        )
        prompt_of_response = [prompt_indices[tuple(prompt.tolist())] for prompt in prompts]
        extensions = [torch.cat([prompt[-1:], prefix]) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        with float32_head(model):
            return extend_prefix_cache(model, prompt_cache, extensions, prompt_of_response, depths, parameters)[1]
    sequences = [torch.cat([prompt, prefix]) for prompt, prefix in zip(prompts, prefixes, strict=True)]
    positions = [
        [len(prompt) - 1 + depth for depth in of_response] for prompt, of_response in zip(prompts, depths, strict=True)
    ]
    with float32_head(model):
        return node_logits(model, sequences, positions, parameters)


def _batches(positions: Sequence[Sequence[int]], vocabulary: int, max_elements: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive sequences whose logits at their common positions are at most ``max_elements`` numbers."""
    first, common = 0, set(positions[0]) if positions else set()
    for index in range(1, len(positions)):
        extended = common | set(positions[index])
        if (index - first + 1) * len(extended) * vocabulary > max_elements:
            yield first, index
            first, extended = index, set(positions[index])
        common = extended
    if positions:
        yield first, len(positions)
