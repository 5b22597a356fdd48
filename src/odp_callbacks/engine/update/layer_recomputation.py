"""Recompute layers in the backward pass where the model asks for it (gradient checkpointing)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from odp_callbacks.engine.replaced_forward import replaced_forward


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, the layers that the model recomputes in training are recomputed in evaluation mode, too.

    transformers does so in training mode only. The variant that does not nest backward passes is used whatever the
    model asks for, because the other one gives gradients to ``.grad`` alone.

    Args:
        model: Its layers are recomputed after ``gradient_checkpointing_enable()``. The backward passes must also be
            inside the block.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                stack.enter_context(replaced_forward(layer, _recomputing(layer.forward)))
        yield


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*arguments: Any, **keywords: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

    return recomputed
