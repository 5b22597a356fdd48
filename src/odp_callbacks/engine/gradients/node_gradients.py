"""From rollouts, nodes and branches to records: teachers' logits, directions, and their Gram matrices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.loss_directions import Direction
from odp_callbacks.engine.gradients.random_projection import projected_gram_matrices
from odp_callbacks.engine.gradients.step_sums import StepAccumulator, half_coefficients
from odp_callbacks.engine.gradients.vjp import node_gram_matrices, summed_vjps
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teachers import Teacher, teacher_logits, teacher_prompt_ids
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.continuations import BranchOutcomes
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.engine.tree.recording import node_record
from odp_callbacks.functional.divergences import node_predictors
from odp_callbacks.records import Floats, NodeRecord

Projector = tuple[int, Randomness]
"""How many random directions gradients are projected on, and what draws them."""


@dataclass(frozen=True)
class NodeDifferentiator:
    """Pulls what teachers and branches ask for back to the student's LoRA parameters.

    Attributes:
        student: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        teachers: By name.
        config: How the probe measures.
        direction: The distillation loss's descent direction on the logits.
    """

    student: nn.Module
    tokenizer: Any
    teachers: dict[str, Teacher]
    config: ProbeConfig
    direction: Direction

    def at_nodes(
        self,
        rollouts: list[Rollout],
        nodes: list[Node],
        branches: list[list[Branch]],
        student_logits: list[Tensor],
        steps: Sequence[StepAccumulator],
        timer: StageTimer,
        projector: Projector | None,
        roots: Mapping[str, Tensor] | None,
    ) -> tuple[list[NodeRecord], list[Floats]]:
        """Teachers' logits, directions, and their Gram matrices, question by question.

        Returns:
            A record for each node; and its Gram matrices ``(M, C, C)`` in the metric whose ``roots`` are given, or
            nothing.
        """
        records: list[NodeRecord] = []
        preconditioned: list[Floats] = []
        asked = 0
        for indices, depths in group_by_question(rollouts, nodes):
            responses = [rollouts[i].response_ids for i in indices]
            question = rollouts[indices[0]].question
            with timer.stage("teachers", len(rollouts), range(asked, asked + len(indices))):
                teachers = [
                    teacher_logits(
                        teacher,
                        self.student,
                        [teacher_prompt_ids(teacher, self.tokenizer, question)] * len(indices),
                        responses,
                        depths,
                    )
                    for teacher in self.teachers.values()
                ]
            asked += len(indices)
            for place, i in enumerate(indices):
                here = range(len(records), len(records) + len(depths[place]))
                with timer.stage("gradients", len(nodes), here):
                    found, grams = self._rollout_nodes(
                        rollouts[i],
                        [nodes[n] for n in here],
                        [branches[n] for n in here],
                        torch.stack([student_logits[n] for n in here]),
                        [logits[place] for logits in teachers],
                        steps,
                        projector,
                        roots,
                    )
                    records += found
                    preconditioned += grams
        return records, preconditioned

    def _rollout_nodes(
        self,
        rollout: Rollout,
        nodes: list[Node],
        branches: list[list[Branch]],
        student_logits: Tensor,
        teachers: list[Tensor],
        steps: Sequence[StepAccumulator],
        projector: Projector | None,
        roots: Mapping[str, Tensor] | None,
    ) -> tuple[list[NodeRecord], list[Floats]]:
        """One rollout's nodes; ``student_logits`` is ``(N, V)``, ``teachers`` ``K`` times ``(N, V')``."""
        tau = self.config.temperature
        z = student_logits.float() if student_logits.dtype != torch.float64 else student_logits
        taken = torch.tensor([rollout.response_ids[node.depth] for node in nodes], device=z.device)
        pulls = torch.stack([self.direction(z, t.to(z), taken) for t in teachers])  # (K, N, V)
        predictors = [node_predictors(z[..., : t.shape[-1]], t.to(z), tau) for t in teachers]
        p = torch.softmax(z / tau, dim=-1)
        directions = []
        for n, row in enumerate(branches):
            arms = -p[n].expand(len(row) - 1, -1).clone()  # (A - 1, V)
            arms[torch.arange(len(row) - 1), [b.token for b in row[1:]]] += 1
            directions.append(torch.cat([arms / tau, pulls[:, n]]))  # (C, V)
        correct = rollout.reward >= self.config.success_threshold
        positions = rollout.positions([node.depth for node in nodes])
        weights = [1 / node.inclusion for node in nodes] if self.config.step_alignment else None
        memory = self.config.memory
        model, ids, count = self.student, rollout.sequence, len(teachers)
        if projector is None:
            grams, sums, preconditioned = node_gram_matrices(
                model, ids, positions, directions, weights, last=count, memory=memory, roots=roots
            )
        else:
            count, randomness = projector
            name = rollout.question.id, "projection", rollout.response_ids
            grams = projected_gram_matrices(
                model, ids, positions, directions, count, randomness.generator(*name), memory
            )
            preconditioned = (
                []
                if roots is None
                else projected_gram_matrices(
                    model, ids, positions, directions, count, randomness.generator(*name), memory, roots
                )
            )
            sums = None
            if weights is not None:
                weighted = pulls * torch.tensor(weights, device=pulls.device)[:, None]
                sums = summed_vjps(model, ids, positions, weighted)
        if sums is not None:
            for step in steps:
                step.add_teachers(rollout.question.id, correct, sums)
        records = [
            node_record(
                rollout,
                node,
                branches[n],
                correct=correct,
                gram=grams[n],
                directions=directions[n],
                teacher_probabilities=[torch.softmax(t[n].to(z) / tau, dim=-1) for t in teachers],
                predictors={k: np.array([float(found[k][n]) for found in predictors]) for k in predictors[0]},
            )
            for n, node in enumerate(nodes)
        ]
        return records, [gram.numpy().copy() for gram in preconditioned]

    def add_ideal(
        self,
        rollouts: list[Rollout],
        records: list[NodeRecord],
        outcomes: list[list[BranchOutcomes]],
        student_logits: list[Tensor],
        steps: Sequence[StepAccumulator],
        timer: StageTimer,
    ) -> None:
        """Sum the ideal gradients: one more forward and one batched backward for each rollout."""
        tau = self.config.temperature
        with timer.stage("step_gradients", len(rollouts)) as progress:
            for i, rollout in enumerate(rollouts):
                progress(i)
                here = [n for n, record in enumerate(records) if record.rollout == i]
                if not here:
                    continue
                cotangents = []
                for n in here:
                    record = records[n]
                    coefficients = half_coefficients(record, outcomes[n]) / record.inclusion / tau  # (2, A - 1)
                    z = student_logits[n].double().cpu()
                    direction = -coefficients.sum(dim=1, keepdim=True) * torch.softmax(z / tau, dim=-1)
                    direction.index_add_(1, torch.from_numpy(record.tokens[1:]), coefficients)
                    cotangents.append(direction)
                positions = rollout.positions([records[n].depth for n in here])
                halves = summed_vjps(self.student, rollout.sequence, positions, torch.stack(cotangents, dim=1))
                for step in steps:
                    step.add_ideal(rollout.question.id, records[here[0]].correct, halves)


def group_by_question(
    rollouts: Sequence[Rollout], nodes: Sequence[Node]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """For each question its rollouts, and for each of those the depths of its nodes, in the order of ``nodes``."""
    depths: dict[int, list[int]] = {}
    for node in nodes:
        depths.setdefault(node.rollout, []).append(node.depth)
    groups: dict[int, list[int]] = {}
    for index in depths:
        groups.setdefault(id(rollouts[index].question), []).append(index)
    for indices in groups.values():
        yield indices, [depths[i] for i in indices]
