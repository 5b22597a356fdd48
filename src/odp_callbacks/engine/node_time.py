"""The time for single tokens: which questions there is time for, and what is kept for the gradients at the end."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.rollouts import Rollout, question_indices
from odp_callbacks.engine.teachers import ServedTeacher
from odp_callbacks.engine.time_plan import TimePlan
from odp_callbacks.engine.tree.planning import MeasuredNodes
from odp_callbacks.engine.unit_costs import PASS, TOKENS, questions_in_time, work_of_sequences

GRADIENTS, STEP_GRADIENTS = "node gradients", "step gradients"
"""Kinds of work in the costs."""
FIXED_SHARE = 1 / 3
"""Share of the time for nodes that passes over whole rollouts may take: the rest is for what depends on the nodes."""
CONTINUATION_SHARE = 0.4
"""Share of the time after the first passes that continuations get at least."""
DIFFERING_SHARE = 0.6
"""Share of the nodes that is expected to need a gradient: where all branches succeed alike, none is computed."""


@dataclass
class NodeTime:
    """Plans the time for the nodes of one probe; without a deadline, everything fits.

    Attributes:
        plan: The deadlines of the stages.
        student: The student.
        teachers: How many teachers there are, ``K``.
        served: Those behind servers, by name.
        left_out: What was left out for lack of time.
    """

    plan: TimePlan
    student: nn.Module
    teachers: int
    served: Mapping[str, ServedTeacher] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def is_limited(self) -> bool:
        """Whether there is a deadline."""
        return self.plan.deadline.is_finite

    def pass_seconds(self, work: float) -> float:
        """Seconds of a forward pass."""
        return self.plan.costs.predict(PASS, work)

    def token_seconds(self) -> float:
        """Seconds for each sampled token; 0 if nothing has been sampled."""
        return self.plan.costs.predict(TOKENS, 1.0)

    def gradient_work(self, nodes: Sequence[tuple[Rollout, int, int]]) -> list[float]:
        """The work of the gradients of each node, in forward passes: one for each direction, up to the node.

        Args:
            nodes: Rollout, depth and number of branches of each.
        """
        lengths = [len(rollout.question.prompt_ids) + depth for rollout, depth, _ in nodes]
        works = zip(work_of_sequences(self.student, lengths), nodes, strict=True)
        return [(branches - 1 + self.teachers) * work for work, (_, _, branches) in works]

    def gradient_seconds(self, work: float) -> float:
        """Seconds for the gradients of nodes with so much work."""
        costs = self.plan.costs
        return costs.predict(GRADIENTS, work) if costs.knows(GRADIENTS) else self.pass_seconds(work)

    def step_seconds(self, rollouts: Sequence[Rollout]) -> float:
        """Seconds for the step alignment of rollouts."""
        if not self.plan.config.step_alignment:
            return 0.0
        work = sum(work_of_sequences(self.student, [len(rollout.sequence) for rollout in rollouts]))
        costs = self.plan.costs
        return (
            costs.predict(STEP_GRADIENTS, work)
            if costs.knows(STEP_GRADIENTS)
            else self.pass_seconds((3 + self.teachers) * work)
        )

    def fits(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether there will be time for the nodes of a question after the update, before that is measured."""
        if not self.is_limited:
            return True
        seconds = max(0.0, self.plan.end.remaining_seconds - self.plan.end_of_update.remaining_seconds)
        # The update asks the servers about all responses, and its answers serve the nodes.
        mean = self._pass_seconds_of(rollouts) / max(1, len({id(rollout.question) for rollout in rollouts}))
        return mean <= 2 * FIXED_SHARE * seconds

    def _pass_seconds_of(self, rollouts: Sequence[Rollout]) -> float:
        """Seconds for passes over whole rollouts.

        These are twice the student's logits, those of the teachers, and the keys and values of continuations.
        """
        work = sum(work_of_sequences(self.student, [len(rollout.sequence) for rollout in rollouts]))
        return self.pass_seconds((3 + self.teachers - len(self.served)) * work)

    def _server_seconds_of(self, rollouts: Sequence[Rollout]) -> float:
        """Seconds that the servers of teachers take for responses that they have not been asked about."""
        responses = [rollout.response_ids for rollout in rollouts]
        return sum(
            teacher.seconds_for([rollout.question.teacher_prompt_ids[name] for rollout in rollouts], responses)
            for name, teacher in self.served.items()
        )

    def affordable(self, rollouts: Sequence[Rollout]) -> list[int]:
        """Return the rollouts whose nodes there is time for; the last questions in the order of the probe are left out.

        Args:
            rollouts: All rollouts.

        Returns:
            Indices of the rollouts of whole questions.
        """
        if not self.is_limited or not rollouts:
            return list(range(len(rollouts)))
        question_of = question_indices(rollouts)
        count = 1 + max(question_of)
        limit = FIXED_SHARE * self.plan.end.remaining_seconds
        mean = max(1e-9, (self._pass_seconds_of(rollouts) + self._server_seconds_of(rollouts)) / count)
        # The number depends on all questions alike, so that the first ones in a random order are a random choice.
        kept_count = min(count, max(int(limit // mean), int(mean <= 2 * limit)))
        kept = set(self.plan.order(count)[:kept_count])
        if kept_count < count:
            self.left_out["questions_without_nodes"] = count - kept_count
        return [index for index, question in enumerate(question_of) if question in kept]

    def affordable_tokens(self) -> float:
        """Tokens that could be sampled in the time that is left; infinite where that is not known."""
        seconds = self.token_seconds()
        return self.plan.end.remaining_seconds / seconds if seconds and self.is_limited else float("inf")

    def gradient_tokens(self, nodes: Sequence[tuple[Rollout, int, int]]) -> list[float]:
        """How many tokens could be sampled while the gradients of each node are computed; 0 without a deadline.

        Args:
            nodes: Rollout, depth and number of branches of each.
        """
        seconds = self.token_seconds()
        if not self.is_limited or not seconds:
            return [0.0] * len(nodes)
        return [self.gradient_seconds(work) / seconds for work in self.gradient_work(nodes)]

    def for_continuations(self, rollouts: Sequence[Rollout], measured: MeasuredNodes) -> Deadline:
        """When continuations must have ended, so that there is time for the gradients.

        Args:
            rollouts: All rollouts.
            measured: The nodes.
        """
        work = sum(self._work(rollouts, measured))
        with_nodes = [rollouts[index] for index in sorted({node.rollout for node in measured.nodes})]
        later = DIFFERING_SHARE * self.gradient_seconds(work) + self.step_seconds(with_nodes)
        return self.plan.end.earlier(min(later, (1 - CONTINUATION_SHARE) * self.plan.end.remaining_seconds))

    def gradient_parts(
        self, rollouts: Sequence[Rollout], measured: MeasuredNodes, chosen: Sequence[int]
    ) -> Iterator[list[int]]:
        """Yield the chosen nodes of some questions at a time, for as long as there is time for their gradients.

        Args:
            rollouts: All rollouts.
            measured: The nodes.
            chosen: The nodes whose gradients are wanted.
        """
        if not self.is_limited:
            yield list(chosen)
            return
        question_of = question_indices(rollouts)
        work = [0.0] * (1 + max(question_of, default=-1))
        of_nodes = self._work(rollouts, measured)
        of_question: dict[int, list[int]] = {}
        for index in chosen:
            question = question_of[measured.nodes[index].rollout]
            work[question] += of_nodes[index]
            of_question.setdefault(question, []).append(index)
        order = [question for question in self.plan.order(len(work)) if question in of_question]
        if not self.plan.costs.knows(GRADIENTS) and order:
            self.plan.costs.record(GRADIENTS, 1.0, self.pass_seconds(1.0))
        done = 0
        for part in questions_in_time(work, order, GRADIENTS, self.plan.costs, self.plan.end):
            done += len(part)
            yield [index for question in part for index in of_question[question]]
        if missing := len(order) - done:
            self.left_out["questions_without_node_gradients"] = missing

    def allows_step(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether there is time for the step alignment; it is noted if there is none."""
        fits = self.plan.end.allows(self.step_seconds(rollouts))
        if not fits:
            self.left_out["nodes_without_step_alignment"] = 1
        return fits

    def _work(self, rollouts: Sequence[Rollout], measured: MeasuredNodes) -> list[float]:
        """The work of the gradients of each node."""
        return self.gradient_work(
            [
                (rollouts[node.rollout], node.depth, len(branches))
                for node, branches in zip(measured.nodes, measured.branches, strict=True)
            ]
        )
