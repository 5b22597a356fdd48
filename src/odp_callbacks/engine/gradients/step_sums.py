"""Gradients summed over the nodes of a probe: the direction that one optimizer step would take."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from odp_callbacks.engine.sampling.randomness import random_bits
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes
from odp_callbacks.records import NodeRecord, StepSums, step_sums

SKETCH_LENGTH = 2**16
"""Vectors longer than this are sketched to this length, a power of two."""
CHUNK_LENGTH = 2**20
"""Parameters that are sketched at a time, a multiple of the sketch's length."""


class StepAccumulator:
    r"""Adds up gradients by question and correctness, and gives the inner products of the sums.

    Vectors longer than :data:`SKETCH_LENGTH` are kept as a count sketch: each parameter is added, with a random sign,
    to one of that many numbers. Inner products stay unbiased, with an error of :math:`1/\sqrt{65536}` = 0.4 % of the
    product of the norms, and memory does not grow with the adapter. Source: Charikar, Chen, Farach-Colton, "Finding
    frequent items in data streams" (2002).

    Args:
        size: Number of LoRA parameters, ``P``.
        teachers: Number of teachers, ``K``.
        scale: ``(P,)``, multiplies every gradient (the square roots of a preconditioner); None for no scaling.
    """

    def __init__(self, size: int, teachers: int, scale: Tensor | None = None) -> None:
        self.teachers = teachers
        self.scale = None if scale is None else scale.float()
        self.length = min(size, SKETCH_LENGTH)
        self._sums: dict[tuple[str, bool], Tensor] = {}
        self.size = size

    def add_distillation(self, question: str, correct: bool, gradients: Tensor) -> None:
        """Add ``(K, P)`` distillation gradients, one for each teacher."""
        self._sums_of(question, correct)[2:] += self._sketch(gradients)

    def add_ideal(self, question: str, correct: bool, halves: Tensor) -> None:
        """Add ``(2, P)`` ideal gradients, from disjoint halves of the continuations."""
        self._sums_of(question, correct)[:2] += self._sketch(halves)

    def leave_out(self, records: Iterable[NodeRecord]) -> None:
        """Leave out the groups of some nodes: without the ideal gradients of these, a group's sums do not correspond.

        Args:
            records: Nodes whose ideal gradient is not known.
        """
        for record in records:
            self._sums.pop((record.question, record.correct), None)

    def sums(self) -> StepSums:
        """The inner products of the sums, by question and correctness."""
        gradient_sums = torch.zeros(0, 2 + self.teachers, self.length, dtype=torch.float32)
        if self._sums:
            gradient_sums = torch.stack(list(self._sums.values()))
        questions = tuple(question for question, _ in self._sums)
        correctness = tuple(correct for _, correct in self._sums)
        return step_sums(questions, correctness, gradient_sums.numpy())

    def _sums_of(self, question: str, correct: bool) -> Tensor:
        """``(2 + K, L)``: the two halves of the ideal gradient, and the teachers' distillation gradients."""
        key = question, correct
        if key not in self._sums:
            self._sums[key] = torch.zeros(2 + self.teachers, self.length, dtype=torch.float32)
        return self._sums[key]

    def _sketch(self, vectors: Tensor) -> Tensor:
        """Scale ``(D, P)`` and reduce it to ``(D, L)``, on its own device; the result is on the CPU."""
        vectors = vectors.float()
        if self.scale is not None:
            self.scale = self.scale.to(vectors.device)
            vectors = vectors * self.scale
        return (vectors if self.size <= SKETCH_LENGTH else count_sketch(vectors)).cpu()


def count_sketch(vectors: Tensor) -> Tensor:
    """Add each number, with a random sign, to one of :data:`SKETCH_LENGTH` numbers; both depend on its place alone.

    The numbers are shuffled in blocks of that length, and the blocks are added. So those of one block never meet, two
    of different blocks meet with the probability of a count sketch, and nothing depends on the order of additions.

    Args:
        vectors: ``(D, P)`` float32, on any device.

    Returns:
        ``(D, L)`` float32.

    Examples:
        >>> sketches = count_sketch(torch.eye(2, 100_000))
        >>> sketches.shape, (sketches @ sketches.T).tolist()
        (torch.Size([2, 65536]), [[1.0, 0.0], [0.0, 1.0]])
    """
    device, mask = vectors.device, SKETCH_LENGTH - 1
    sketch = torch.zeros(len(vectors), SKETCH_LENGTH, device=device)
    places = torch.arange(SKETCH_LENGTH, device=device)
    for first in range(0, vectors.shape[1], CHUNK_LENGTH):
        chunk = vectors[:, first : first + CHUNK_LENGTH]
        blocks = torch.arange(-(-chunk.shape[1] // SKETCH_LENGTH), device=device)
        signs = 1 - 2 * (random_bits(torch.arange(first, first + chunk.shape[1], device=device)) & 1)
        padded = functional.pad(chunk * signs, (0, len(blocks) * SKETCH_LENGTH - chunk.shape[1]))
        # A product with an odd number, and a sum, permute the numbers below a power of two.
        bits = random_bits(-1 - first // SKETCH_LENGTH - blocks)[:, None]  # negative: no place of a number
        order = (places * (bits | 1) + (bits >> 32)) & mask  # (b, L)
        shuffled = padded.view(len(vectors), len(blocks), -1).gather(2, order.expand(len(vectors), -1, -1))
        sketch += shuffled.sum(dim=1)
    return sketch


def half_coefficients(record: NodeRecord, outcomes: list[BranchOutcomes]) -> Tensor:
    """Coefficients of the ideal gradient on the branch directions, from each half of the rewards.

    Where all rewards of a branch are in one half, both halves use them. Such a branch has few continuations, because
    its weight is small.

    Args:
        record: The node's record.
        outcomes: The rewards of its ``A`` branches.

    Returns:
        ``(2, A - 1)`` float64.
    """
    success = np.empty((2, len(outcomes)))
    for branch_index, outcome in enumerate(outcomes):
        for half_index in range(2):
            rewards = [
                reward
                for reward, reward_half in zip(outcome.rewards, outcome.halves, strict=True)
                if reward_half == half_index
            ]
            success[half_index, branch_index] = np.mean(rewards or outcome.rewards)
    return torch.from_numpy(record.weight[1:] * (success[:, 1:] - success[:, :1]))
