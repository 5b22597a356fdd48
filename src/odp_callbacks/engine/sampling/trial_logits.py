"""What all trials of the backends share: random tokens, the model's own logits, and how much may differ from them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.attention import model_configs
from odp_callbacks.engine.sampling.exact_arithmetic import computes_exactly
from odp_callbacks.engine.sampling.model_forward import embedded_tokens, vocabulary_size
from odp_callbacks.engine.sampling.rotary_state import dynamic_rotaries, forget_lengths
from odp_callbacks.functional.gradients import logits_at

LOGIT_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest error of the logits, relative to the largest logit, by dtype.

Some families compute their softmax in float32 whatever the dtype of the model, which the tolerance for float64 allows
for.
"""
HALF_PRECISION_TOLERANCE = 0.1
"""Root of the mean squared error of logits that were computed in half precision, relative to their spread."""


def own_logits(model: nn.Module, input_ids: Tensor, positions: Sequence[int]) -> Tensor:
    """The model's own logits ``(N, V)`` at positions of ``input_ids``, by one forward pass over all of these.

    Args:
        model: Causal language model, in evaluation mode.
        input_ids: ``(T,)`` int64.
        positions: ``N`` of its positions.
    """
    device = next(model.parameters()).device
    forget_lengths(dynamic_rotaries(model))
    with torch.no_grad():
        return logits_at(model, input_ids[None].to(device), torch.tensor(list(positions), device=device))[0]


def check_logits(model: nn.Module, expected: Tensor, logits: Tensor) -> None:
    """Raise ``ArithmeticError`` unless ``logits`` are ``expected`` up to rounding, row by row.

    Args:
        model: The model that computed both.
        expected: ``(N, V)``, from :func:`own_logits`.
        logits: ``(N, V)``.
    """
    wide, difference = expected.double(), (expected.double() - logits.double())
    if computes_exactly(model) and expected.dtype in LOGIT_TOLERANCES:
        tolerance = LOGIT_TOLERANCES[expected.dtype]
        errors = difference.abs().amax(dim=-1) / wide.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    else:
        tolerance = HALF_PRECISION_TOLERANCE
        spread = wide.std(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        errors = difference.square().mean(dim=-1).sqrt() / spread
    error = float(errors.max())
    if not error <= tolerance:  # also for NaN
        raise ArithmeticError(f"its logits differ by {error:.1g} from those of the full forward pass")


def random_sequences(model: nn.Module, lengths: Sequence[int]) -> list[Tensor]:
    """Random tokens, the same for every call; none that stand for something else than text.

    Args:
        model: Its configurations say which tokens stand for images, for example.
        lengths: ``T_s``, the length of each sequence.

    Returns:
        ``(T_s,)`` int64 each, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    rows = embedded_tokens(model)
    token_count = vocabulary_size(model) if rows is None else min(rows, vocabulary_size(model))
    sequences = [torch.randint(token_count, (length,), generator=generator) for length in lengths]
    special = _placeholder_tokens(model)
    ordinary = next((token for token in range(token_count) if token not in special), 0)
    for sequence in sequences:
        sequence[torch.isin(sequence, torch.tensor(sorted(special), dtype=torch.long))] = ordinary
    return sequences


def _placeholder_tokens(model: nn.Module) -> set[int]:
    """Tokens that a configuration names for images, sound and the like."""
    text_tokens = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id"}
    found: set[int] = set()
    for config in model_configs(model):
        values: dict[str, Any] = vars(config)
        found |= {
            value
            for name, value in values.items()
            if name.endswith(("_token_id", "_token_index")) and name not in text_tokens and isinstance(value, int)
        }
    return found
