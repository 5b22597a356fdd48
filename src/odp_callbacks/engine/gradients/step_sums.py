"""Summed gradients of a probe, for the step alignment: what an optimizer's step would see."""

import numpy as np
import torch
from torch import Tensor

from odp_callbacks.engine.tree.continuations import BranchOutcomes
from odp_callbacks.records import NodeRecord, StepSums, step_sums

SKETCH = 2**16
"""Longer vectors are sketched to so many numbers."""
CHUNK = 2**20
"""Parameters that are sketched at a time."""


class StepAccumulator:
    r"""Adds up gradients by question and correctness, and takes their inner products in the end.

    Vectors longer than :data:`SKETCH` are kept as a count sketch (each parameter is added, with a random sign, to one
    of that many numbers): inner products stay unbiased, and their error is :math:`1/\sqrt{65536}` = 0.4 % of the
    product of the norms, so that memory does not grow with the adapter. Source: Charikar, Chen, Farach-Colton,
    "Finding frequent items in data streams" (2002).

    Args:
        size: ``P``, LoRA parameters.
        teachers: ``K``.
        scale: ``(P,)``, what every vector is multiplied with; None for nothing.
    """

    def __init__(self, size: int, teachers: int, scale: Tensor | None = None) -> None:
        self.teachers = teachers
        self.scale = None if scale is None else scale.float().cpu()
        self.length = min(size, SKETCH)
        self._sums: dict[tuple[str, bool], Tensor] = {}
        self.size = size

    def add_teachers(self, question: str, correct: bool, vectors: Tensor) -> None:
        """Add ``(K, P)`` distillation gradients."""
        self._group(question, correct)[2:] += self._sketch(vectors)

    def add_ideal(self, question: str, correct: bool, halves: Tensor) -> None:
        """Add ``(2, P)`` ideal gradients, from disjoint halves of the continuations."""
        self._group(question, correct)[:2] += self._sketch(halves)

    def sums(self) -> StepSums:
        """The sums, and their inner products."""
        keys = list(self._sums)
        vectors = torch.zeros(0, 2 + self.teachers, self.length)
        if keys:
            vectors = torch.stack([self._sums[key] for key in keys])
        return step_sums(tuple(q for q, _ in keys), tuple(c for _, c in keys), vectors.numpy())

    def _group(self, question: str, correct: bool) -> Tensor:
        key = question, correct
        if key not in self._sums:
            self._sums[key] = torch.zeros(2 + self.teachers, self.length, dtype=torch.float32)
        return self._sums[key]

    def _sketch(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float().cpu()
        if self.scale is not None:
            vectors = vectors * self.scale
        if self.size <= SKETCH:
            return vectors
        found = torch.zeros(len(vectors), SKETCH, dtype=torch.float32)
        for start in range(0, self.size, CHUNK):
            part = vectors[:, start : start + CHUNK]
            # Drawn anew each time: kept, the draws of a large adapter would fill gigabytes.
            generator = torch.Generator().manual_seed(start)
            bucket = torch.randint(SKETCH, (part.shape[1],), generator=generator)
            sign = torch.randint(2, (part.shape[1],), generator=generator, dtype=torch.int8) * 2 - 1
            found.index_add_(1, bucket, part * sign)
        return found


def half_coefficients(record: NodeRecord, outcomes: list[BranchOutcomes]) -> Tensor:
    """Coefficients of the ideal gradient on the branch directions from each half of the rewards, ``(2, A - 1)``.

    A branch that has only one half lends it to the other: it must then weigh little, which is why it got so few.
    """
    halves = np.empty((2, len(outcomes)))
    for a, outcome in enumerate(outcomes):
        for h in range(2):
            chosen = [r for r, half in zip(outcome.rewards, outcome.halves, strict=True) if half == h]
            halves[h, a] = np.mean(chosen or outcome.rewards)
    return torch.from_numpy(record.weight[1:] * (halves[:, 1:] - halves[:, :1]))
