"""What the graph of a student allows: tried once for each student, against a fresh graph for each direction.

Some kernels write into the tensors that they have saved, or into the gradient that they are given: the first backward
through their graph is right, and later ones are not (Liger's SwiGLU is one). Others take no batch of directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.layer_tape import LayerTape
from odp_callbacks.engine.sampling.exact_arithmetic import computes_exactly, exact_arithmetic
from odp_callbacks.engine.sampling.rotary_state import preserving_rotary_state
from odp_callbacks.engine.sampling.trial_logits import random_sequences
from odp_callbacks.functional.gradients import logits_at, lora_parameters
from odp_callbacks.text import first_line

TRIAL_TOKENS = 5
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest error relative to the largest gradient, by dtype of the LoRA parameters."""
HALF_PRECISION_TOLERANCE = 0.1


@dataclass(frozen=True)
class GraphVerdict:
    """What was found of a student.

    Attributes:
        reusable: Whether several backward passes through one graph give what fresh graphs give.
        why_no_tape: Why its layers cannot be computed again one by one; empty if they can.
    """

    reusable: bool
    why_no_tape: str

    def require_reusable(self) -> None:
        """Raise ``ValueError`` if a second direction through one graph would get a wrong gradient."""
        if not self.reusable:
            reason = f" ({self.why_no_tape})" if self.why_no_tape else ""
            raise ValueError(
                "`student` has a layer that spoils its graph in the first backward pass, so that a second direction "
                f"would get a wrong gradient, and its layers cannot be computed again one by one{reason}; switch off "
                "custom kernels such as Liger's."
            )


class GraphTrial:
    """Tries each student once and remembers the result. Students are held weakly."""

    def __init__(self) -> None:
        self._verdicts: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], GraphVerdict]] = WeakKeyDictionary()

    def __call__(self, student: nn.Module) -> GraphVerdict:
        """What the graph of ``student`` allows.

        Args:
            student: Student with LoRA, in evaluation mode.

        Raises:
            ValueError: If the same direction gives different gradients in two fresh graphs.
        """
        names = tuple(lora_parameters(student))
        verdicts = self._verdicts.setdefault(student, {})
        if names not in verdicts:
            with (
                preserving_rotary_state(student),
                torch.inference_mode(False),
                torch.enable_grad(),
                exact_arithmetic(student),
            ):
                verdicts[names] = _try(student)
        return verdicts[names]


graph_verdict = GraphTrial()


def check_graph(student: nn.Module) -> None:
    """Check that gradients of a student are right for more than one direction, before anything is sampled.

    Args:
        student: Student with LoRA, in evaluation mode.

    Raises:
        ValueError: If no way of computing them is; the message says why, and what would work.
    """
    verdict = graph_verdict(student)
    if verdict.why_no_tape:
        verdict.require_reusable()


def _try(student: nn.Module) -> GraphVerdict:
    parameters = {name: p.detach().requires_grad_() for name, p in lora_parameters(student).items()}
    device = next(student.parameters()).device
    ids = random_sequences(student, [TRIAL_TOKENS])[0].to(device)[None]
    positions = torch.tensor([TRIAL_TOKENS // 2, TRIAL_TOKENS - 1], device=device)

    def run() -> Tensor:
        return logits_at(student, ids, positions, parameters=parameters)[0]

    def flat(logits: Tensor, retain: bool = False) -> Tensor:
        # A kernel may also write into the gradient that it is given.
        given = direction.clone()
        options = {"retain_graph": retain, "materialize_grads": True, "allow_unused": True}
        gradients = torch.autograd.grad(logits, list(parameters.values()), given, **options)
        rows = [gradient.flatten() for gradient in gradients]
        if len({row.device for row in rows}) > 1:  # a student in parts on several devices
            rows = [row.cpu() for row in rows]
        return torch.cat(rows).cpu().double()

    logits = run()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    expected = flat(logits, retain=True)
    if not expected.isfinite().all():
        return GraphVerdict(True, "its gradients are not finite")
    tolerance = TOLERANCES.get(next(iter(parameters.values())).dtype, HALF_PRECISION_TOLERANCE)
    if not computes_exactly(student):
        tolerance = HALF_PRECISION_TOLERANCE

    def deviates(found: Tensor) -> bool:
        return not float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())

    reusable = not _fails(lambda: deviates(flat(logits)))
    if deviates(flat(run())):
        raise ValueError(
            "`student` gives different gradients for the same direction in two forward passes, so no gradient of it "
            "can be measured; switch off what is random or remembered in its forward, such as dropout in evaluation "
            "mode, or kernels that are not deterministic."
        )
    return GraphVerdict(reusable, _why_no_tape(student, run, parameters, direction, reusable, deviates))


def _fails(deviates: Callable[[], bool]) -> bool:
    """Whether gradients deviate or cannot be computed."""
    try:
        return deviates()
    except torch.OutOfMemoryError:
        raise  # this is no property of the student
    except RuntimeError:
        return True


def _why_no_tape(
    student: nn.Module,
    run: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    direction: Tensor,
    reusable: bool,
    deviates: Callable[[Tensor], bool],
) -> str:
    try:
        tape = LayerTape(student, run, parameters, fresh_graphs=not reusable)
        both = tape.flat_gradients(torch.stack([direction, direction])).double()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        return first_line(error)
    if any(deviates(row) for row in both):
        return "gradients by recomputed layers differ from those of the whole graph"
    return ""
