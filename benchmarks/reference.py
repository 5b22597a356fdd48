"""The probe as one would write it in an afternoon: plain, exact, and what the library's speed is measured against.

`generate` from the whole prefix for each branch, one forward and one backward for each node and direction. It knows
transformers and peft, and takes rollouts, nodes and branches from whoever compares.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from odp_callbacks.functional import lora_parameters


@torch.no_grad()
def continuations(
    model: Any, prefix: Tensor, count: int, limit: int, eos: Sequence[int], temperature: float = 1.0
) -> list[list[int]]:
    """`count` continuations of ``prefix`` ``(T,)``: `generate(num_return_sequences=count)`."""
    plain = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=limit,
        num_return_sequences=count,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
    )
    written = model.generate(
        input_ids=prefix[None], attention_mask=torch.ones_like(prefix)[None], generation_config=plain
    )
    rows = written[:, len(prefix) :].tolist()
    ends = [next((t + 1 for t, k in enumerate(row) if k in eos), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@torch.no_grad()
def logits(model: nn.Module, sequence: Tensor) -> Tensor:
    """``(T, V)`` of one sequence."""
    found: Tensor = model(input_ids=sequence[None], use_cache=False).logits[0]
    return found


def gradient(model: nn.Module, sequence: Tensor, position: int, direction: Tensor) -> Tensor:
    """One direction ``(V,)`` on the logits at ``position`` pulled back to the LoRA parameters, ``(P,)``."""
    parameters = list(lora_parameters(model).values())
    with torch.enable_grad():
        z = model(input_ids=sequence[None], use_cache=False).logits[0, position]
        pulled = torch.autograd.grad((z * direction).sum(), parameters)
    return torch.cat([g.flatten() for g in pulled])


def grams(model: nn.Module, sequence: Tensor, positions: Sequence[int], directions: Sequence[Tensor]) -> list[Tensor]:
    """Gram matrices ``(C, C)`` of each node's directions ``(C, V)``."""
    found = []
    for position, several in zip(positions, directions, strict=True):
        rows = torch.stack([gradient(model, sequence, position, v) for v in several]).double()
        found.append(rows @ rows.T)
    return found
