"""Whether gradients of the segments of a batch equal those that autograd gives, tried once for each student."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from odp_callbacks.engine.sampling.exact_arithmetic import computes_exactly, exact_arithmetic
from odp_callbacks.engine.sampling.rotary_state import preserving_rotary_state
from odp_callbacks.engine.sampling.trial_logits import random_sequences
from odp_callbacks.engine.update.backward import WholeGraph
from odp_callbacks.engine.update.lora_segments import SegmentedLoraLinears, segment_gradients
from odp_callbacks.engine.update.split_model import SplitModel
from odp_callbacks.engine.update.token_layout import TokenLayout, layout_of_sequences
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.text import first_line

TRIAL_TOKENS = 3
"""Another number than that of the sequences, so that a layer that swaps the two is noticed."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest error relative to the largest gradient, by dtype of the LoRA parameters."""
HALF_PRECISION_TOLERANCE = 0.1

_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], str]] = WeakKeyDictionary()


def why_no_segments(model: SplitModel, linears: SegmentedLoraLinears) -> str:
    """Why the gradients of a student's LoRA parameters cannot be told apart by segments of a batch.

    Args:
        model: The student.
        linears: Its LoRA layers.

    Returns:
        The reason; empty if they can be told apart.
    """
    if linears.uncovered:
        return linears.uncovered
    names = tuple(lora_parameters(model.model))
    found = _FOUND.setdefault(model.model, {})
    if names not in found:
        with preserving_rotary_state(model.model), torch.inference_mode(False), exact_arithmetic(model.model):
            found[names] = _failure(model, linears)
    return found[names]


def _failure(model: SplitModel, linears: SegmentedLoraLinears) -> str:
    sequences = random_sequences(model.model, [TRIAL_TOKENS, TRIAL_TOKENS])
    layout = layout_of_sequences(sequences, [range(TRIAL_TOKENS)] * len(sequences))
    try:
        found, cotangent = _segments(model, linears, layout)
        expected = _by_autograd(model, layout, cotangent)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return first_line(error)
    tolerance = TOLERANCES.get(expected.dtype, HALF_PRECISION_TOLERANCE)
    if not computes_exactly(model.model):
        tolerance = HALF_PRECISION_TOLERANCE
    deviation = float((found.double() - expected.double()).abs().max())
    if not deviation <= tolerance * float(expected.double().abs().max()):
        return f"their gradients differ by {deviation:.1g} from those of autograd"
    return ""


def _segments(model: SplitModel, linears: SegmentedLoraLinears, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """The gradients ``(2, P)`` of both sequences, and the direction ``(N, H)`` that they are of."""
    device = next(model.model.parameters()).device
    with torch.enable_grad(), linears.recording(torch.arange(2, device=device)) as sums:
        graph = WholeGraph(lambda: model.run(layout))
        shape, generator = graph.outputs.shape, torch.Generator().manual_seed(0)
        cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(graph.outputs)
        return segment_gradients(graph, sums, cotangent[None], 2)[:, 0], cotangent


def _by_autograd(model: SplitModel, layout: TokenLayout, cotangent: Tensor) -> Tensor:
    parameters = {name: p.detach().requires_grad_() for name, p in lora_parameters(model.model).items()}
    with torch.enable_grad():
        rows = []
        for sequence in range(2):
            hidden = model.run(layout, parameters)  # some layers spoil their graph in a backward
            of_one = cotangent * (layout.rows == sequence).to(cotangent)[:, None]
            gradients = torch.autograd.grad(hidden, list(parameters.values()), of_one, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)
