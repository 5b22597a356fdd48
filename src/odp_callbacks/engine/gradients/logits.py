"""Logits where they are needed, and nowhere else."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from odp_callbacks.engine.sampling.backends import BACKENDS, backend_of
from odp_callbacks.engine.sampling.prefix_cache import extend_prefix_cache, prefill, vocabulary_size
from odp_callbacks.functional.gradients import logits_at


def node_logits(
    model: nn.Module,
    sequences: Sequence[Tensor],
    positions: Sequence[Sequence[int]],
    parameters: dict[str, Tensor] | None = None,
    most_elements: int = 2**26,
) -> list[Tensor]:
    """Logits at chosen positions of each sequence, in padded batches; gradients pass where they are on.

    Args:
        model: Causal language model in the mode that the caller wants.
        sequences: ``(T_s,)`` int64 each.
        positions: For each sequence, the positions asked for.
        parameters: Replacements for parameters of ``model``.
        most_elements: The most logits to hold in one batch.

    Returns:
        ``(N_s, V)`` each.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    for first, last in _batches(positions, vocabulary_size(model), most_elements):
        batch = sequences[first:last]
        wanted = sorted({p for row in positions[first:last] for p in row})
        lengths = torch.tensor([len(s) for s in batch])
        ids = pad_sequence([s.cpu() for s in batch], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = logits_at(model, ids.to(device), torch.tensor(wanted, device=device), mask.to(device), parameters)
        place = {p: i for i, p in enumerate(wanted)}
        found += [logits[row, [place[p] for p in ps]] for row, ps in enumerate(positions[first:last])]
    return found


def response_logits(
    model: nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
    parameters: dict[str, Tensor] | None = None,
) -> list[Tensor]:
    """Logits at chosen depths of responses; equal prompts are read once, whatever the number of responses.

    Student and teachers take this same way; hence a teacher that equals the student gives the same bits, and is seen
    to say nothing.

    Args:
        model: Causal language model in the mode that the caller wants.
        prompts: ``(P_r,)`` int64, one for each response.
        responses: Response tokens.
        depths: For each response, the ``N_r`` depths that are asked for.
        parameters: Replacements for parameters of ``model``.

    Returns:
        ``(N_r, V)`` each.
    """
    if not responses:
        return []
    tails = [torch.tensor(list(r[: max(d)]), dtype=torch.long) for r, d in zip(responses, depths, strict=True)]
    if backend_of(model) == BACKENDS[0]:
        different = list(dict.fromkeys(tuple(p.tolist()) for p in prompts))
        place = {ids: q for q, ids in enumerate(different)}
        trunks = prefill(model, [torch.tensor(ids[:-1], dtype=torch.long) for ids in different], parameters)
        owners = [place[tuple(p.tolist())] for p in prompts]
        limbs = [torch.cat([p[-1:], tail]) for p, tail in zip(prompts, tails, strict=True)]
        return extend_prefix_cache(model, trunks, limbs, owners, depths, parameters)[1]
    sequences = [torch.cat([p, tail]) for p, tail in zip(prompts, tails, strict=True)]
    positions = [[len(p) - 1 + t for t in d] for p, d in zip(prompts, depths, strict=True)]
    return node_logits(model, sequences, positions, parameters)


def _batches(positions: Sequence[Sequence[int]], vocabulary: int, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive runs of sequences whose common positions' logits are at most ``most`` numbers."""
    first, union = 0, set(positions[0]) if positions else set()
    for index in range(1, len(positions)):
        joined = union | set(positions[index])
        if (index - first + 1) * len(joined) * vocabulary > most:
            yield first, index
            first, joined = index, set(positions[index])
        union = joined
    if positions:
        yield first, len(positions)
