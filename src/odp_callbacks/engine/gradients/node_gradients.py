"""Directions on the logits of nodes, and Gram matrices of the gradients that belong to them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.gram_matrices import NodeGrams, lora_modules
from odp_callbacks.engine.gradients.graph_memory import in_less_memory
from odp_callbacks.engine.gradients.loss_directions import Direction
from odp_callbacks.engine.gradients.node_logits import RolloutLogits
from odp_callbacks.engine.gradients.random_projection import RandomProjection, projected_gram_matrices
from odp_callbacks.engine.gradients.step_sums import StepAccumulator, half_coefficients
from odp_callbacks.engine.gradients.vjp import node_gram_matrices, summed_vjps
from odp_callbacks.engine.teachers import Teacher
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.engine.tree.planning import MeasuredNodes
from odp_callbacks.engine.tree.recording import is_scored, node_record
from odp_callbacks.functional.distillation_losses import node_predictors
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.functional.top_k import top_k_predictors
from odp_callbacks.records import Floats, NodeRecord


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

    def describe_nodes(self, measured: MeasuredNodes) -> list[NodeRecord]:
        """Make the records of all nodes from the logits alone: they have neither gradients nor outcomes yet.

        Args:
            measured: The nodes.
        """
        records: list[NodeRecord] = []
        modules = len(lora_modules(list(lora_parameters(self.student))))
        for number in range(len(measured.logits.questions)):
            for logits in measured.logits.of_question(number):
                records += self._describe_rollout(measured, logits, modules)
        return records

    def add_gradients(
        self,
        measured: MeasuredNodes,
        records: Sequence[NodeRecord],
        chosen: Collection[int],
        timer: StageTimer,
        *,
        projection: RandomProjection | None = None,
        square_roots: Mapping[str, Tensor] | None = None,
        failures: dict[int, Exception] | None = None,
    ) -> tuple[list[NodeRecord], list[Floats]]:
        """Compute the Gram matrices of chosen nodes; those of one rollout go through one forward pass.

        Args:
            measured: The nodes.
            records: Their records.
            chosen: Indices of the nodes whose gradients are computed.
            timer: Times the stage ``"gradients"``.
            projection: Estimate the Gram matrices by random projection; None for exact ones.
            square_roots: Also compute the Gram matrices under the preconditioner with these square roots.
            failures: Receives, by node, the error that kept its gradients from being computed; None raises it.

        Returns:
            The records, and for each node its Gram matrices ``(M, C, C)`` under the preconditioner; the latter list is
            empty without one. NaN at nodes that are not chosen.
        """
        completed = list(records)
        if projection is not None:
            # Projected gradients cannot be told apart by module.
            completed = [replace(record, gram=record.gram[:1]) for record in records]
        preconditioned = [] if square_roots is None else [np.full_like(record.gram, np.nan) for record in completed]
        done = 0
        for number in range(len(measured.logits.questions)):
            if not any(index in chosen for index in measured.logits.nodes_of(number)):
                continue
            of_question = [index for index in measured.logits.nodes_of(number) if index in chosen]
            with timer.stage("gradients", len(chosen), range(done, done + len(of_question))):
                missing = set(of_question)
                try:
                    for indices, gradients in self._gradients_of_question(
                        measured, number, chosen, projection, square_roots
                    ):
                        for index, gram in zip(indices, gradients.grams, strict=True):
                            # Copies: the records outlive the probe and must not keep its tensors alive.
                            completed[index] = replace(records[index], gram=gram.numpy().copy())
                        for index, gram in zip(indices, gradients.preconditioned, strict=False):
                            preconditioned[index] = gram.numpy().copy()
                        missing -= set(indices)
                except Exception as error:
                    if failures is None:
                        raise
                    failures.update(dict.fromkeys(missing, error.with_traceback(None)))  # it would hold tensors
            done += len(of_question)
        return completed, preconditioned

    def _gradients_of_question(
        self,
        measured: MeasuredNodes,
        number: int,
        chosen: Collection[int],
        projection: RandomProjection | None,
        square_roots: Mapping[str, Tensor] | None,
    ) -> Iterator[tuple[list[int], NodeGrams]]:
        """Yield the chosen nodes of each rollout of a question, and their Gram matrices."""
        for of_rollout in measured.logits.of_question(number):
            places = [place for place, index in enumerate(of_rollout.node_indices) if index in chosen]
            if places:
                logits = of_rollout.take(places)
                arguments = measured, logits, projection, square_roots
                yield (
                    logits.node_indices,
                    in_less_memory(partial(self._gradients_of_rollout, *arguments), self.config.max_memory_bytes),
                )

    def add_step_gradients(
        self,
        measured: MeasuredNodes,
        records: Sequence[NodeRecord],
        outcomes: Sequence[list[BranchOutcomes]],
        accumulators: Sequence[StepAccumulator],
        timer: StageTimer,
    ) -> None:
        """Add the gradients of every rollout to the step sums, with one forward and one batched backward each.

        Args:
            measured: The nodes.
            records: Their records.
            outcomes: The outcomes of each node's branches.
            accumulators: Receive the ideal gradients of two halves of the outcomes, and each teacher's gradient.
            timer: Times the stage ``"step_gradients"``.
        """
        with timer.stage("step_gradients", len(measured.nodes)) as progress:
            for number in range(len(measured.logits.questions)):
                progress(measured.logits.nodes_of(number).start)
                for of_rollout in measured.logits.of_question(number):
                    places = [place for place, index in enumerate(of_rollout.node_indices) if is_scored(records[index])]
                    if places:
                        self._add_step_gradients(of_rollout.take(places), records, outcomes, accumulators)

    def _add_step_gradients(
        self,
        logits: RolloutLogits,
        records: Sequence[NodeRecord],
        outcomes: Sequence[list[BranchOutcomes]],
        accumulators: Sequence[StepAccumulator],
    ) -> None:
        rollout, chosen = logits.rollout, [records[index] for index in logits.node_indices]
        ideal = [
            _ideal_directions(record, outcomes[index], logits.student[place], self.config.temperature)
            for place, (index, record) in enumerate(zip(logits.node_indices, chosen, strict=True))
        ]
        weights = logits.student.new_tensor([1 / record.inclusion for record in chosen], dtype=torch.float64)
        distillation = self._distillation(logits, chosen).double() * weights[:, None]
        directions = torch.cat([torch.stack(ideal, dim=1), distillation])  # (2 + K, N, V)
        positions = rollout.positions([record.depth for record in chosen])
        sums = in_less_memory(
            lambda limit: summed_vjps(self.student, rollout.sequence, positions, directions, limit),
            self.config.max_memory_bytes,
        )
        for accumulator in accumulators:
            accumulator.add_ideal(rollout.question.id, chosen[0].correct, sums[:2])
            accumulator.add_distillation(rollout.question.id, chosen[0].correct, sums[2:])

    def _describe_rollout(self, measured: MeasuredNodes, logits: RolloutLogits, modules: int) -> list[NodeRecord]:
        """The records of one rollout's nodes."""
        rollout, temperature = logits.rollout, self.config.temperature
        directions = self._directions(measured, logits)
        predictors = []
        for teacher in logits.teachers:
            pair = logits.student[..., : teacher.shape[-1]], teacher, temperature
            predictors.append({**node_predictors(*pair), **top_k_predictors(*pair)})
        return [
            node_record(
                rollout,
                measured.nodes[index],
                measured.branches[index],
                correct=rollout.reward >= self.config.success_threshold,
                modules=modules,
                directions=directions[place],
                teacher_probabilities=[torch.softmax(t[place] / temperature, dim=-1) for t in logits.teachers],
                predictors={
                    name: np.array([float(of_teacher[name][place]) for of_teacher in predictors])
                    for name in predictors[0]
                },
            )
            for place, index in enumerate(logits.node_indices)
        ]

    def _directions(self, measured: MeasuredNodes, logits: RolloutLogits) -> list[Tensor]:
        """Directions on the logits of each of a rollout's nodes, ``(C, V)``: of its branches, then of the teachers."""
        nodes = [measured.nodes[index] for index in logits.node_indices]
        distillation = self._distillation(logits, nodes)
        probabilities = torch.softmax(logits.student / self.config.temperature, dim=-1)
        return [
            torch.cat(
                [
                    _branch_directions(probabilities[place], measured.branches[index]) / self.config.temperature,
                    distillation[:, place],
                ]
            )
            for place, index in enumerate(logits.node_indices)
        ]

    def _distillation(self, logits: RolloutLogits, nodes: Sequence[Node | NodeRecord]) -> Tensor:
        """Each teacher's direction on the logits of a rollout's nodes, ``(K, N, V)``."""
        taken = [logits.rollout.response_ids[node.depth] for node in nodes]
        taken_tokens = torch.tensor(taken, device=logits.student.device)
        return torch.stack([self.direction(logits.student, teacher, taken_tokens) for teacher in logits.teachers])

    def _gradients_of_rollout(
        self,
        measured: MeasuredNodes,
        logits: RolloutLogits,
        projection: RandomProjection | None,
        square_roots: Mapping[str, Tensor] | None,
        max_memory_bytes: float | None,
    ) -> NodeGrams:
        """Gram matrices at the nodes of one rollout, exact or projected."""
        rollout, directions = logits.rollout, self._directions(measured, logits)
        positions = rollout.positions([measured.nodes[index].depth for index in logits.node_indices])
        if projection is None:
            return node_gram_matrices(
                self.student,
                rollout.sequence,
                positions,
                directions,
                max_memory_bytes=max_memory_bytes,
                square_roots=square_roots,
            )
        arguments = self.student, rollout.sequence, positions, directions, projection.count
        # The generator starts anew for the second matrices: both are projected on the same random directions.
        grams = projected_gram_matrices(*arguments, projection.generator(rollout), max_memory_bytes=max_memory_bytes)
        preconditioned: list[Tensor] = []
        if square_roots is not None:
            preconditioned = projected_gram_matrices(
                *arguments,
                projection.generator(rollout),
                max_memory_bytes=max_memory_bytes,
                square_roots=square_roots,
            )
        return NodeGrams(grams, preconditioned)


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
    logits = student_logits.double()
    coefficients = half_coefficients(record, outcomes).to(logits) / record.inclusion / temperature  # (2, A - 1)
    directions = -coefficients.sum(dim=1, keepdim=True) * torch.softmax(logits / temperature, dim=-1)
    directions.index_add_(1, torch.from_numpy(record.tokens[1:]).to(logits.device), coefficients)
    return directions
