"""The direct implementation that the library's speed is measured against: simple and exact.

`generate` from the whole prefix for each branch, one forward and one backward pass for each node and direction. It
uses transformers and peft alone, and takes rollouts, nodes and branches from its caller.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from odp_callbacks.functional import lora_parameters


@torch.no_grad()
def continuations(
    model: Any,
    prefix: Tensor,
    count: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    temperature: float = 1.0,
) -> list[list[int]]:
    """`count` continuations of ``prefix`` ``(T,)``, by `generate(num_return_sequences=count)`."""
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=count,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
    )
    sequences = model.generate(
        input_ids=prefix[None], attention_mask=torch.ones_like(prefix)[None], generation_config=config
    )
    rows = sequences[:, len(prefix) :].tolist()
    ends = [next((length + 1 for length, token in enumerate(row) if token in eos_token_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@torch.no_grad()
def logits(model: nn.Module, sequence: Tensor) -> Tensor:
    """``(T, V)`` of one sequence."""
    values: Tensor = model(input_ids=sequence[None], use_cache=False).logits[0]
    return values


def gradient(model: nn.Module, sequence: Tensor, position: int, direction: Tensor) -> Tensor:
    """``(P,)``: the vector-Jacobian product of one direction ``(V,)`` on the logits at ``position``."""
    parameters = list(lora_parameters(model).values())
    with torch.enable_grad():
        position_logits = model(input_ids=sequence[None], use_cache=False).logits[0, position]
        gradients = torch.autograd.grad((position_logits * direction).sum(), parameters)
    return torch.cat([part.flatten() for part in gradients])


def gram_matrices(
    model: nn.Module, sequence: Tensor, positions: Sequence[int], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Gram matrices ``(C, C)`` of the gradients of each node's directions ``(C, V)``."""
    grams = []
    for position, node_directions in zip(positions, directions, strict=True):
        gradients = torch.stack([gradient(model, sequence, position, direction) for direction in node_directions])
        grams.append(gradients.double() @ gradients.double().T)
    return grams
