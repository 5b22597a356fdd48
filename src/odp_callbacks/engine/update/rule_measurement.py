"""The directions of rules: one more backward for each rule and teacher, on the batches of an update's measurement."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.unit_costs import work_of_sequences
from odp_callbacks.engine.update.batch_directions import BatchDirections
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.response_tokens import (
    ResponseRewards,
    Rule,
    class_weights,
    response_tokens,
    rule_weights,
)
from odp_callbacks.engine.update.row_sketch import RowSketch
from odp_callbacks.engine.update.update_rows import BLOCK_NUMBERS_ELSEWHERE, UpdateRows
from odp_callbacks.engine.update.update_time import RULES, UpdateTime
from odp_callbacks.records import Floats
from odp_callbacks.update_records import RuleProducts, TokenFeatures

Batches = Sequence[tuple[list[int], BatchDirections]]
"""Batches of an update's measurement: the indices of their rollouts, and their directions."""


def features_of_batches(rollouts: Sequence[Rollout], batches: Batches) -> TokenFeatures | None:
    """What rules may ask about all response tokens, and further predictors; None if the batches do not know them.

    Args:
        rollouts: All rollouts.
        batches: Those that have tokens, each once.
    """
    if not batches or any(directions.features is None for _, directions in batches):
        return None
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    teachers = len(batches[0][1].norms)
    values = np.zeros((9, teachers, starts[-1]), dtype=np.float32)
    for batch, directions in batches:
        values[:, :, places_of(batch, starts)] = directions.features
    student_entropy, teacher_entropy, student_log_prob, teacher_log_prob, reverse_kl, *of_top_k = values
    overlap, advantage, student_mass, teacher_mass = of_top_k
    return TokenFeatures(
        rollout=np.repeat(np.arange(len(rollouts)), lengths),
        depth=np.concatenate([np.arange(length) for length in lengths]),
        # Every teacher's row has the student's own features.
        student_entropy=student_entropy[0],
        student_log_prob=student_log_prob[0],
        teacher_entropy=teacher_entropy.T,
        teacher_log_prob=teacher_log_prob.T,
        reverse_kl=reverse_kl.T,
        top_k_overlap=overlap.T,
        overlap_advantage=advantage.T,
        student_mass_on_teacher_top_k=student_mass.T,
        teacher_mass_on_student_top_k=teacher_mass.T,
    )


def places_of(batch: Sequence[int], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of a batch's tokens among all response tokens.

    Args:
        batch: Indices of rollouts.
        starts: Index of the first token of each rollout, and the number of all tokens.
    """
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])


class RuleMeter:
    """Measures the directions of rules on the batches of one measurement.

    Args:
        gradients: Computes the gradients.
        rules: By name.
        rollouts: All rollouts.
        correct: Whether each is correct.
        group_of: The group of each rollout's question.
        batches: Those of the measurement.
        features: Of all response tokens.
    """

    def __init__(
        self,
        gradients: UpdateGradients,
        rules: Mapping[str, Rule],
        rollouts: Sequence[Rollout],
        correct: Sequence[bool],
        group_of: Sequence[int],
        batches: Batches,
        features: TokenFeatures,
    ) -> None:
        self.gradients, self.rollouts, self.group_of, self.batches = gradients, rollouts, group_of, batches
        teachers = tuple(gradients.teachers)
        rewards = ResponseRewards(
            [len(rollout.response_ids) for rollout in rollouts],
            [rollout.reward for rollout in rollouts],
            correct,
            [id(rollout.question) for rollout in rollouts],
        )
        self.starts = np.concatenate([[0], np.cumsum(rewards.lengths)])
        tokens = [response_tokens(features, rewards, teachers, index) for index in range(len(teachers))]
        of_tokens = np.repeat(np.asarray(correct, bool), rewards.lengths)
        self.weights: dict[str, Floats] = {}
        for name, rule in rules.items():
            weights = np.stack([rule_weights(rule, name, of_teacher) for of_teacher in tokens])  # (K, N)
            # A rule that weights by correctness alone is a sum of directions that are known already.
            if any(class_weights(row, of_tokens) is None for row in weights):
                self.weights[name] = weights

    def measure(
        self,
        sums: UpdateRows,
        progress: Callable[[int], None] | None = None,
        done: int = 0,
        time: UpdateTime | None = None,
    ) -> RuleProducts | None:
        """Measure rule by rule: only one rule's gradients are in memory at a time.

        Args:
            sums: The gradients of all tokens.
            progress: Called with the number of rollouts that are done.
            done: How many were done before.
            time: How long it may take; None for no limit. Rules for which there is no time are left out.

        Returns:
            The products of the rules whose weights are not constant in each class; None if there are none.
        """
        time = time or UpdateTime()
        work = sum(work_of_sequences(self.gradients.student, [len(rollout.sequence) for rollout in self.rollouts]))
        whole = sums.directions.sum(dim=2)  # (F, K, P)
        measured = []
        for weights in self.weights.values():
            if not time.allows(RULES, work):
                break
            start = time.deadline.elapsed_seconds
            rows = torch.zeros_like(whole)
            for batch, directions in self.batches:
                self._add(rows, batch, directions, weights, sums.sketch)
                done += len(batch)
                if progress is not None:
                    progress(done)
            time.costs.record(RULES, work, time.deadline.elapsed_seconds - start)
            measured.append([_products(sums.success, rows), _products(rows, rows), _products(rows, whole)])
        if not measured:
            return None
        cross, own, of_whole = (np.stack(products) for products in zip(*measured, strict=True))
        weights_of = dict(list(self.weights.items())[: len(measured)])
        return RuleProducts(
            names=tuple(weights_of),
            weight=np.stack([weights.sum(axis=1) for weights in weights_of.values()]),
            tokens=np.stack([self._tokens_by_group(weights, len(whole)) for weights in weights_of.values()]),
            cross=cross,
            own=own,
            whole=of_whole,
        )

    def _add(
        self, rows: Tensor, batch: list[int], directions: BatchDirections, weights: Floats, sketch: RowSketch
    ) -> None:
        """Add a batch's gradients to the rows of its groups."""
        groups = sorted({self.group_of[i] for i in batch})
        of_tokens = torch.from_numpy(weights[:, places_of(batch, self.starts)])
        chosen, segments = [self.rollouts[i] for i in batch], [groups.index(self.group_of[i]) for i in batch]
        of_batch = self.gradients.graphs.in_less_memory(
            lambda: self.gradients.weighted_rows(chosen, directions, of_tokens, segments), chosen
        )
        rows[groups] += sketch(of_batch.float().to(rows.device))

    def _tokens_by_group(self, weights: Floats, groups: int) -> Floats:
        """``(F, K)``, tokens with a weight above 0."""
        group = np.repeat(np.asarray(self.group_of), np.diff(self.starts))
        return np.stack([np.bincount(group, weights=row > 0, minlength=groups) for row in weights], axis=1)


def _products(first: Tensor, second: Tensor) -> Floats:
    """Inner products ``(F, F, K)`` of rows ``(F, K, P)``, or ``(F, P)`` for all teachers, and rows ``(F, K, P)``."""
    first = first if first.dim() == 3 else first[:, None].expand(-1, second.shape[1], -1)
    # On a CPU in one piece, so that the order of the sums does not depend on a size of blocks.
    width = first.shape[-1] if first.device.type == "cpu" else max(1, BLOCK_NUMBERS_ELSEWHERE // first[..., 0].numel())
    products = torch.zeros(len(first), len(second), second.shape[1], dtype=torch.float64, device=first.device)
    for left, right in zip(first.split(width, dim=-1), second.split(width, dim=-1), strict=True):
        products += torch.einsum("fkp,hkp->fhk", left.double(), right.double())
    moved: Floats = products.cpu().numpy()
    return moved
