"""Tangents of hidden states along directions on the LoRA parameters, for all positions of a batch at once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odp_callbacks.engine.gradients.chunked_attention import CHUNK_NUMBERS, numbers_at_a_time
from odp_callbacks.engine.gradients.layer_sizes import layer_sizes
from odp_callbacks.engine.gradients.tangent_rules import TangentRules
from odp_callbacks.engine.sampling.memory import free_bytes

ATTENTION_COPIES = 4
"""Arrays of the size of a chunk of attention scores that a direction holds."""


def tangents_of_states(
    states: Callable[[dict[str, Tensor]], Tensor],
    student: nn.Module,
    parameters: dict[str, Tensor],
    tangents: Mapping[str, Tensor],
    *,
    at_a_time: int | None = None,
    scores: int = CHUNK_NUMBERS,
) -> Tensor:
    """Push directions on the parameters forward.

    Args:
        states: Maps values of the parameters to hidden states ``(N, H)`` of ``student``.
        student: The student.
        parameters: Its LoRA parameters, detached.
        tangents: For each parameter ``(S, *shape)``.
        at_a_time: Directions that go through one pass together, at most; None for all.
        scores: Attention scores that are held at a time for each direction, at most.

    Returns:
        ``(S, N, H)``.
    """

    def pushed_forward(tangent: dict[str, Tensor]) -> Tensor:
        pushed: Tensor = torch.func.jvp(states, (parameters,), (tangent,))[1]
        return pushed

    typed = {name: tangents[name].to(p) for name, p in parameters.items()}
    # Only plain attention has a forward mode. Models with attention of their own compute it in one piece.
    with sdpa_kernel(SDPBackend.MATH), TangentRules(scores), without_input_gradient_hooks(student):
        moved: Tensor = torch.func.vmap(pushed_forward, chunk_size=at_a_time)(typed)
    return moved


@dataclass(frozen=True)
class TangentMemory:
    """Memory that directions take on their way forward through a model, by an estimate; its sizes are read once.

    Attributes:
        device: Where the model is.
        bytes_of_token: What a direction takes for each token, without attention.
        bytes_of_parameters: What it takes on the LoRA parameters.
        heads: Query heads of a layer.
    """

    device: torch.device
    bytes_of_token: float
    bytes_of_parameters: int
    heads: int

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, Tensor]) -> "TangentMemory":
        """Read the sizes of a student.

        Args:
            model: The student.
            parameters: Its LoRA parameters.
        """
        sizes, parameter = layer_sizes(model), next(model.parameters())
        of_token = max(4, parameter.element_size()) * (4 * sizes.widest + 6 * sizes.hidden)
        trained = parameter.element_size() * sum(p.numel() for p in parameters.values())
        return cls(parameter.device, of_token, 2 * trained, sizes.heads)

    def scores(self, max_memory_bytes: float | None) -> int:
        """How many attention scores are held at a time for each direction, at most.

        Args:
            max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.
        """
        return numbers_at_a_time(self.device, free_bytes(self.device, max_memory_bytes))

    def directions(self, tokens: int, max_memory_bytes: float | None) -> int:
        """How many directions may go forward through a batch together; at least 1.

        Args:
            tokens: Tokens of the batch, with its padding.
            max_memory_bytes: Memory to use, in bytes, at most; None for half of what is free.
        """
        scores = min(self.scores(max_memory_bytes), self.heads * tokens**2)
        of_tangent = tokens * self.bytes_of_token + 4 * ATTENTION_COPIES * scores + self.bytes_of_parameters
        # The pass that they ride on takes as much as one of them.
        return max(1, int(free_bytes(self.device, max_memory_bytes) // of_tangent) - 1)


@contextmanager
def without_input_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Take out the hooks that make inputs require gradients, and put them back as they were.

    transformers and peft register them on the input embeddings for gradient checkpointing. A forward pass in forward
    mode cannot run them, and does not need them.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    hooks = {} if embeddings is None else embeddings._forward_hooks
    before = dict(hooks)
    try:
        for key, hook in before.items():
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del hooks[key]
        yield
    finally:
        hooks.clear()
        hooks.update(before)
