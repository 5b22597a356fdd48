"""Tangents of hidden states along directions on the LoRA parameters, for all positions of a batch at once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def tangents_of_states(
    states: Callable[[dict[str, Tensor]], Tensor],
    student: nn.Module,
    parameters: dict[str, Tensor],
    tangents: Mapping[str, Tensor],
) -> Tensor:
    """Push directions on the parameters forward.

    Args:
        states: Maps values of the parameters to hidden states ``(N, H)`` of ``student``.
        student: The student.
        parameters: Its LoRA parameters, detached.
        tangents: For each parameter ``(S, *shape)``.

    Returns:
        ``(S, N, H)``.
    """

    def pushed_forward(tangent: dict[str, Tensor]) -> Tensor:
        pushed: Tensor = torch.func.jvp(states, (parameters,), (tangent,))[1]
        return pushed

    typed = {name: tangents[name].to(p) for name, p in parameters.items()}
    # Only the plain attention kernel has a forward mode.
    with sdpa_kernel(SDPBackend.MATH), without_input_gradient_hooks(student):
        moved: Tensor = torch.func.vmap(pushed_forward)(typed)
    return moved


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
