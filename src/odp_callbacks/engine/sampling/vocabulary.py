"""Whether what a model returns as logits has one number for each token of its vocabulary."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from odp_callbacks.engine.sampling.model_forward import vocabulary_size
from odp_callbacks.functional.gradients import logits_at


class LogitWidthError(ValueError):
    """A model's logits are not over its vocabulary."""


def check_logit_widths(models: Iterable[nn.Module]) -> None:
    """Check models before training; those that cannot run yet are checked when they first do.

    Args:
        models: Causal language models. A trainer may still have to move them, for example.

    Raises:
        LogitWidthError: If one of them does not return logits over its vocabulary.
    """
    for model in models:
        try:
            check_logit_width(model)
        except LogitWidthError:
            raise
        except Exception:  # whatever stops a model that has not been placed yet
            continue


def check_logit_width(model: nn.Module) -> None:
    """Check that ``model`` returns logits over its vocabulary, and not hidden states or logits of another width.

    Args:
        model: Causal language model, in evaluation mode.

    Raises:
        LogitWidthError: If it does not.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = logits_at(model, torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long))
    config: Any = getattr(model, "config", None)
    text_config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    widths = {vocabulary_size(model), getattr(text_config, "vocab_size", None)} - {None}
    if logits.shape[-1] not in widths:
        raise LogitWidthError(
            f"{type(model).__name__} must return logits over its vocabulary of {vocabulary_size(model)} tokens, but "
            f"`logits` has a width of {logits.shape[-1]}; a model that returns hidden states as logits (as unsloth's "
            "do with UNSLOTH_RETURN_HIDDEN_STATES) cannot be measured."
        )
