"""The logits of the student and of every teacher at the nodes of a probe."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from odp_callbacks.engine.gradients.logits import response_logits
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.sampling.memory import free_bytes
from odp_callbacks.engine.teachers import ServedTeacher, Teacher, teacher_logits
from odp_callbacks.engine.tree.nodes import Node, group_by_question


@dataclass(frozen=True)
class RolloutLogits:
    """Logits at the ``N_r`` nodes of one rollout.

    Attributes:
        rollout: The rollout.
        node_indices: ``N_r``, which of the probe's nodes these are.
        student: ``(N_r, V)``, at least float32.
        teachers: ``(N_r, V')`` for each teacher, in the same dtype.
    """

    rollout: Rollout
    node_indices: list[int]
    student: Tensor
    teachers: list[Tensor]

    def take(self, chosen: Sequence[int]) -> "RolloutLogits":
        """Select nodes by their places among these."""
        places = list(chosen)
        return RolloutLogits(
            self.rollout,
            [self.node_indices[place] for place in places],
            self.student[places],
            [logits[places] for logits in self.teachers],
        )


class NodeLogits:
    """Computes logits question by question, and keeps those of teachers as far as memory allows.

    Student and teachers are run in the same batches: a teacher that equals the student gives the same bits.

    Args:
        student: The student, in evaluation mode.
        teachers: The teachers by name; ``K`` of them.
        rollouts: The probe's rollouts; their questions hold the teachers' prompts.
        nodes: The nodes. Those of one rollout stand together, and so do those of one question.
        max_memory_bytes: How many bytes the teachers' logits may take; None for half of what is free.
        source: Logits of a larger set of nodes, which are taken from there as far as they are kept.

    Attributes:
        teachers: The teachers by name.
        nodes: The nodes.
        student_logits: ``N`` tensors ``(V,)``.
        questions: For each question with nodes, the indices of its rollouts.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, Teacher],
        rollouts: Sequence[Rollout],
        nodes: Sequence[Node],
        max_memory_bytes: float | None = None,
        source: "NodeLogits | None" = None,
    ) -> None:
        self._student, self._rollouts, self.teachers = student, rollouts, dict(teachers)
        self.nodes = list(nodes)
        grouped = list(group_by_question(rollouts, nodes))
        self.questions = [rollout_indices for rollout_indices, _ in grouped]
        self._depths = [depths for _, depths in grouped]
        self._first_nodes = [0, *accumulate(sum(map(len, depths)) for depths in self._depths)]
        self._kept: dict[int, list[list[Tensor]]] = {}
        self._free_bytes: float = free_bytes(next(student.parameters()).device, max_memory_bytes)
        self.student_logits: list[Tensor] = []
        for number in range(len(self.questions)):
            known = None if source is None else source.kept_rows(self.questions[number], self._depths[number])
            if known is None:
                self.student_logits += self._compute_student_logits(number)
            else:
                self.student_logits += known[0]
                self._keep(number, known[1])

    def kept_rows(
        self, rollout_indices: Sequence[int], depths: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[list[Tensor]]] | None:
        """The logits at some of the nodes of one question, if the teachers' are kept; otherwise None.

        Args:
            rollout_indices: Rollouts of the question.
            depths: The depths of nodes of each.

        Returns:
            The student's logits at each node, and for each teacher and rollout ``(N_r, V')``.
        """
        number = next(n for n, own in enumerate(self.questions) if rollout_indices[0] in own)
        if number not in self._kept:
            return None
        first_node, student = self._first_nodes[number], list[Tensor]()
        teachers: list[list[Tensor]] = [[] for _ in self.teachers]
        for place, (rollout_index, own_depths) in enumerate(
            zip(self.questions[number], self._depths[number], strict=True)
        ):
            if rollout_index in rollout_indices:
                rows = [own_depths.index(depth) for depth in depths[list(rollout_indices).index(rollout_index)]]
                student += [self.student_logits[first_node + row] for row in rows]
                for chosen, of_teacher in zip(teachers, self._kept[number], strict=True):
                    chosen.append(of_teacher[place][rows])
            first_node += len(own_depths)
        return student, teachers

    def compute_ahead(self) -> None:
        """Compute the teachers' logits of as many questions as can be kept."""
        for number in range(len(self.questions)):
            self._teacher_logits(number)
            if number not in self._kept:
                break

    def of_question(self, number: int) -> Iterator[RolloutLogits]:
        """Yield the logits of each rollout of a question.

        Args:
            number: Index in :attr:`questions`.
        """
        teachers = self._teacher_logits(number)
        first_node = self._first_nodes[number]
        for place, (rollout_index, depths) in enumerate(zip(self.questions[number], self._depths[number], strict=True)):
            node_indices = list(range(first_node, first_node + len(depths)))
            first_node += len(depths)
            student = torch.stack([self.student_logits[index] for index in node_indices])
            if student.dtype != torch.float64:
                student = student.float()
            yield RolloutLogits(
                self._rollouts[rollout_index],
                node_indices,
                student,
                [of_teacher[place].to(student) for of_teacher in teachers],
            )

    def nodes_of(self, number: int) -> range:
        """The indices of the nodes of a question."""
        return range(self._first_nodes[number], self._first_nodes[number + 1])

    def _teacher_logits(self, number: int) -> list[list[Tensor]]:
        """For each teacher and each rollout of a question, the logits at its nodes, ``(N_r, V')``."""
        if number in self._kept:
            return self._kept[number]
        rollouts = [self._rollouts[index] for index in self.questions[number]]
        responses = [rollout.response_ids for rollout in rollouts]
        students = None
        if any(isinstance(teacher, ServedTeacher) for teacher in self.teachers.values()):
            of_nodes = torch.stack([self.student_logits[index] for index in self.nodes_of(number)])
            students = of_nodes.split([len(depths) for depths in self._depths[number]])
        logits = [
            teacher_logits(
                teacher,
                self._student,
                [rollout.question.teacher_prompt_ids[name] for rollout in rollouts],
                responses,
                self._depths[number],
                students,
            )
            for name, teacher in self.teachers.items()
        ]
        self._keep(number, logits)
        return logits

    def _keep(self, number: int, logits: list[list[Tensor]]) -> None:
        """Keep the teachers' logits of a question if there is memory for them."""
        size = sum(part.numel() * part.element_size() for of_teacher in logits for part in of_teacher)
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._kept[number] = logits

    def _compute_student_logits(self, number: int) -> list[Tensor]:
        """The student's logits at each node of a question, ``(V,)``."""
        rollouts = [self._rollouts[index] for index in self.questions[number]]
        prompts = [rollout.question.prompt_ids for rollout in rollouts]
        responses = [rollout.response_ids for rollout in rollouts]
        by_rollout = response_logits(self._student, prompts, responses, self._depths[number])
        return [row for logits in by_rollout for row in logits]
