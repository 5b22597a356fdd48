"""From rollouts, nodes and branches to records: teachers' logits, directions on the logits, and Gram matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.gram_matrices import NodeGrams
from odp_callbacks.engine.gradients.loss_directions import Direction
from odp_callbacks.engine.gradients.random_projection import RandomProjection, projected_gram_matrices
from odp_callbacks.engine.gradients.step_sums import StepAccumulator, half_coefficients
from odp_callbacks.engine.gradients.vjp import WeightedSum, node_gram_matrices, summed_vjps
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.teachers import Teacher, teacher_logits
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes
from odp_callbacks.engine.tree.nodes import Node, group_by_question
from odp_callbacks.engine.tree.planning import MeasuredNodes
from odp_callbacks.engine.tree.recording import is_scored, node_record
from odp_callbacks.functional.distillation_losses import node_predictors
from odp_callbacks.records import Floats, NodeRecord


@dataclass(frozen=True)
class RolloutNodes:
    """The ``N`` nodes of one rollout.

    Attributes:
        rollout: The rollout.
        nodes: Its nodes.
        branches: The branches of each node.
        student_logits: ``(N, V)``, at least float32.
        teacher_logits: ``(N, V')`` for each teacher, in the same dtype.
    """

    rollout: Rollout
    nodes: list[Node]
    branches: list[list[Branch]]
    student_logits: Tensor
    teacher_logits: list[Tensor]

    @property
    def positions(self) -> list[int]:
        """The position of each node in the rollout's sequence."""
        return self.rollout.positions([node.depth for node in self.nodes])

    @property
    def taken_tokens(self) -> Tensor:
        """The token that the rollout took at each node, ``(N,)`` int64."""
        taken = [self.rollout.response_ids[node.depth] for node in self.nodes]
        return torch.tensor(taken, device=self.student_logits.device)


@dataclass(frozen=True)
class NodeDifferentiator:
    """Computes the gradients on the student's LoRA parameters that teachers and branches ask for.

    Attributes:
        student: The student, in evaluation mode.
        teachers: The teachers by name; ``K`` of them.
        config: How the probe measures.
        direction: Gives the descent direction of the distillation loss on the logits.
    """

    student: nn.Module
    teachers: dict[str, Teacher]
    config: ProbeConfig
    direction: Direction

    def measure_nodes(
        self,
        rollouts: Sequence[Rollout],
        measured: MeasuredNodes,
        accumulators: Sequence[StepAccumulator],
        timer: StageTimer,
        *,
        projection: RandomProjection | None = None,
        square_roots: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[NodeRecord], list[Floats]]:
        """Compute teachers' logits, directions and Gram matrices, one question at a time.

        Args:
            rollouts: Every rollout of the probe; their questions hold the teachers' prompts.
            measured: The nodes. Those of one rollout are together, and so are those of one question.
            accumulators: Receive each teacher's gradient at every node.
            timer: Times the stages ``"teachers"`` and ``"gradients"``.
            projection: Estimate the Gram matrices by random projection; None for exact ones.
            square_roots: Also compute the Gram matrices under the preconditioner with these square roots.

        Returns:
            A record for each node, and its Gram matrices ``(M, C, C)`` under the preconditioner; the latter list is
            empty without one.
        """
        records: list[NodeRecord] = []
        preconditioned: list[Floats] = []
        rollouts_seen = 0
        for rollout_indices, depths in group_by_question(rollouts, measured.nodes):
            of_question = [rollouts[index] for index in rollout_indices]
            stage_part = range(rollouts_seen, rollouts_seen + len(of_question))
            with timer.stage("teachers", len(rollouts), stage_part):
                question_logits = self._teacher_logits(of_question, depths)
            rollouts_seen += len(of_question)
            for rollout_place, rollout in enumerate(of_question):
                node_indices = range(len(records), len(records) + len(depths[rollout_place]))
                with timer.stage("gradients", len(measured.nodes), node_indices):
                    student_logits = torch.stack([measured.student_logits[index] for index in node_indices])
                    if student_logits.dtype != torch.float64:
                        student_logits = student_logits.float()
                    rollout_nodes = RolloutNodes(
                        rollout,
                        [measured.nodes[index] for index in node_indices],
                        [measured.branches[index] for index in node_indices],
                        student_logits,
                        [of_teacher[rollout_place].to(student_logits) for of_teacher in question_logits],
                    )
                    new_records, new_grams = self.measure_rollout(rollout_nodes, accumulators, projection, square_roots)
                    records += new_records
                    preconditioned += new_grams
        return records, preconditioned

    def measure_rollout(
        self,
        rollout_nodes: RolloutNodes,
        accumulators: Sequence[StepAccumulator],
        projection: RandomProjection | None,
        square_roots: Mapping[str, Tensor] | None,
    ) -> tuple[list[NodeRecord], list[Floats]]:
        """Compute directions and Gram matrices at the nodes of one rollout.

        Args:
            rollout_nodes: The nodes, with student's and teachers' logits.
            accumulators: Receive each teacher's gradient at every node.
            projection: As for :meth:`measure_nodes`.
            square_roots: As for :meth:`measure_nodes`.

        Returns:
            As for :meth:`measure_nodes`.
        """
        rollout = rollout_nodes.rollout
        student, teachers = rollout_nodes.student_logits, rollout_nodes.teacher_logits
        temperature = self.config.temperature
        distillation = torch.stack(
            [self.direction(student, teacher, rollout_nodes.taken_tokens) for teacher in teachers]
        )  # (K, N, V)
        probabilities = torch.softmax(student / temperature, dim=-1)
        directions = [
            torch.cat([_branch_directions(probabilities[n], branches) / temperature, distillation[:, n]])
            for n, branches in enumerate(rollout_nodes.branches)
        ]  # (C, V) for each node
        gradients = self._gram_matrices(rollout_nodes, directions, distillation, projection, square_roots)
        correct = rollout.reward >= self.config.success_threshold
        if gradients.sums is not None:
            for accumulator in accumulators:
                accumulator.add_distillation(rollout.question.id, correct, gradients.sums)
        predictors = [node_predictors(student[..., : teacher.shape[-1]], teacher, temperature) for teacher in teachers]
        records = [
            node_record(
                rollout,
                node,
                rollout_nodes.branches[n],
                correct=correct,
                gram=gradients.grams[n],
                directions=directions[n],
                teacher_probabilities=[torch.softmax(teacher[n] / temperature, dim=-1) for teacher in teachers],
                predictors={
                    name: np.array([float(of_teacher[name][n]) for of_teacher in predictors]) for name in predictors[0]
                },
            )
            for n, node in enumerate(rollout_nodes.nodes)
        ]
        return records, [gram.numpy().copy() for gram in gradients.preconditioned]

    def add_ideal_gradients(
        self,
        rollouts: Sequence[Rollout],
        measured: MeasuredNodes,
        records: list[NodeRecord],
        outcomes: list[list[BranchOutcomes]],
        accumulators: Sequence[StepAccumulator],
        timer: StageTimer,
    ) -> None:
        """Add the ideal gradients of every rollout, with one more forward and one batched backward each.

        Args:
            rollouts: Every rollout of the probe.
            measured: The nodes.
            records: Their records.
            outcomes: The outcomes of each node's branches.
            accumulators: Receive the gradients.
            timer: Times the stage ``"step_gradients"``.
        """
        temperature = self.config.temperature
        with timer.stage("step_gradients", len(rollouts)) as progress:
            for rollout_index, rollout in enumerate(rollouts):
                progress(rollout_index)
                indices = [
                    index
                    for index, record in enumerate(records)
                    if record.rollout == rollout_index and is_scored(record)
                ]
                if not indices:
                    continue
                directions = [
                    _ideal_directions(records[index], outcomes[index], measured.student_logits[index], temperature)
                    for index in indices
                ]
                positions = rollout.positions([records[index].depth for index in indices])
                halves = summed_vjps(self.student, rollout.sequence, positions, torch.stack(directions, dim=1))
                for accumulator in accumulators:
                    accumulator.add_ideal(rollout.question.id, records[indices[0]].correct, halves)

    def _teacher_logits(self, rollouts: list[Rollout], depths: list[list[int]]) -> list[list[Tensor]]:
        """For each teacher and each of one question's rollouts, the logits at ``depths``, ``(N_r, V')``."""
        question = rollouts[0].question
        responses = [rollout.response_ids for rollout in rollouts]
        return [
            teacher_logits(
                teacher, self.student, [question.teacher_prompt_ids[name]] * len(rollouts), responses, depths
            )
            for name, teacher in self.teachers.items()
        ]

    def _gram_matrices(
        self,
        rollout_nodes: RolloutNodes,
        directions: list[Tensor],
        distillation: Tensor,
        projection: RandomProjection | None,
        square_roots: Mapping[str, Tensor] | None,
    ) -> NodeGrams:
        """Gram matrices of ``directions``, exact or projected, and weighted sums of the distillation gradients."""
        ids, positions = rollout_nodes.rollout.sequence, rollout_nodes.positions
        max_memory_bytes = self.config.max_memory_bytes
        weights = [1 / node.inclusion for node in rollout_nodes.nodes] if self.config.step_alignment else None
        if projection is None:
            weighted_sum = None if weights is None else WeightedSum(weights, len(self.teachers))
            return node_gram_matrices(
                self.student,
                ids,
                positions,
                directions,
                weighted_sum=weighted_sum,
                max_memory_bytes=max_memory_bytes,
                square_roots=square_roots,
            )
        arguments = self.student, ids, positions, directions, projection.count
        # The generator starts anew for the second matrices: both are projected on the same random directions.
        grams = projected_gram_matrices(
            *arguments, projection.generator(rollout_nodes.rollout), max_memory_bytes=max_memory_bytes
        )
        preconditioned: list[Tensor] = []
        if square_roots is not None:
            preconditioned = projected_gram_matrices(
                *arguments,
                projection.generator(rollout_nodes.rollout),
                max_memory_bytes=max_memory_bytes,
                square_roots=square_roots,
            )
        sums = None
        if weights is not None:
            weighted = distillation * torch.tensor(weights, dtype=torch.float32, device=distillation.device)[:, None]
            sums = summed_vjps(self.student, ids, positions, weighted)
        return NodeGrams(grams, sums, preconditioned)


def _branch_directions(probabilities: Tensor, branches: Sequence[Branch]) -> Tensor:
    """``e_k - p`` for every branch but the first, ``(A - 1, V)``; ``probabilities`` is ``p``, ``(V,)``."""
    others = branches[1:]
    directions = -probabilities.expand(len(others), -1).clone()
    directions[torch.arange(len(others)), [branch.token for branch in others]] += 1
    return directions


def _ideal_directions(
    record: NodeRecord, outcomes: list[BranchOutcomes], student_logits: Tensor, temperature: float
) -> Tensor:
    """The ideal gradient on a node's logits from each half of its continuations, weighted; ``(2, V)`` float64."""
    coefficients = half_coefficients(record, outcomes) / record.inclusion / temperature  # (2, A - 1)
    logits = student_logits.double().cpu()
    directions = -coefficients.sum(dim=1, keepdim=True) * torch.softmax(logits / temperature, dim=-1)
    directions.index_add_(1, torch.from_numpy(record.tokens[1:]), coefficients)
    return directions
