"""The probe: from rows to a report, in one pass through the stages."""

import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.analysis.estimators import half_width
from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.logits import node_logits, response_logits
from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.engine.gradients.node_gradients import NodeDifferentiator, group_by_question
from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.gradients.random_projection import ALL_MODULES, projection_is_cheaper, supports_projection
from odp_callbacks.engine.gradients.step_sums import StepAccumulator
from odp_callbacks.engine.gradients.vjp import lora_modules
from odp_callbacks.engine.prompts import Question, Row, as_questions, check_length
from odp_callbacks.engine.rewards import RewardError, RewardFunction, score
from odp_callbacks.engine.rollouts import Rollout, end_tokens, given_rollouts, sample_rollouts, score_rollouts
from odp_callbacks.engine.sampling.backends import prefill_rollouts
from odp_callbacks.engine.sampling.continuous_batching import Progress
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.student import check_student, trained_beside, uncompiled
from odp_callbacks.engine.teachers import Teacher, as_teachers, teacher_prompt_ids
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.tree.branches import Branch, choose_branches
from odp_callbacks.engine.tree.budget import (
    planned_continuations,
    read_allocation_state,
    remaining_length,
    spend_budget,
    subsample_nodes,
)
from odp_callbacks.engine.tree.continuations import BranchOutcomes, ContinuationCost, ContinuationTree, measure_success
from odp_callbacks.engine.tree.journal import Journal
from odp_callbacks.engine.tree.nodes import Node, every_node, select_nodes
from odp_callbacks.engine.tree.recording import with_outcomes
from odp_callbacks.engine.tree.rollout_rewards import from_rewards, taken_branches
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.records import NodeRecord, ProbeReport, RolloutRecord


class Probe:
    """Measures the alignment of teachers on a student's own rollouts.

    Usable alone, as a training-free diagnostic: :func:`diagnose` is the short form.

    Args:
        student: Causal language model with LoRA (peft).
        tokenizer: Its tokenizer.
        reward: The verifier, a TRL reward function.
        teachers: A mapping from name to :class:`~odp_callbacks.engine.teachers.Teacher`, or what
            :func:`~odp_callbacks.engine.teachers.as_teachers` takes.
        config: How to measure.

    Raises:
        ValueError: If the student is not adapted by LoRA alone (:func:`~odp_callbacks.engine.student.check_student`),
            or a teacher cannot teach it.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        reward: RewardFunction,
        teachers: object,
        config: ProbeConfig | None = None,
    ) -> None:
        if not callable(reward):
            raise TypeError(f"`reward` must be a function of prompts, completions and columns, but got {reward!r}.")
        self.tokenizer = tokenizer
        self.reward = reward
        self.teachers: dict[str, Teacher] = as_teachers(teachers)
        self.config = config or ProbeConfig()
        student = uncompiled(student)
        check_student(student)
        if beside := trained_beside(student):
            warnings.warn(
                f"`student` also trains {sum(beside.values()):,} parameters beside its LoRA parameters "
                f"({next(iter(beside)).removeprefix('base_model.model.')}, …); alignment is measured on the latter.",
                stacklevel=2,
            )
        self.student = student
        self.modules = tuple(lora_modules(list(lora_parameters(student))))
        self._verifier = Verifier(reward, self.config.reward_seconds)
        self.eos_token_ids = end_tokens(student, tokenizer, self.config.eos_token_ids)
        direction = distillation_direction(
            self.config.divergence, self.config.beta, self.config.top_k, self.config.temperature
        )
        self._gradients = NodeDifferentiator(student, tokenizer, self.teachers, self.config, direction)
        for teacher in self.teachers.values():
            teacher.check(student, tokenizer)

    def validate(self, rows: Sequence[Row]) -> None:
        """Check rows before any work: prompts, templates, lengths, and what the reward function returns.

        Raises:
            ValueError: If a row has no prompt or is too long, a template names a column that is missing, or the
                reward function returns the wrong number of rewards or one outside [0, 1].
        """
        if len(rows) == 0:
            raise ValueError("`prompts` has no rows; give at least one question.")
        questions = as_questions(rows, self.tokenizer)
        self._check_lengths(questions)
        with preserving_training_state():
            try:
                score(self.reward, questions[:2], [""] * len(questions[:2]), [()] * len(questions[:2]))
            except RewardError:
                raise
            except Exception as error:
                # Many verifiers never meet an empty response, so this one may still be sound.
                warnings.warn(f"`reward` raised {type(error).__name__} on an empty completion: {error}", stacklevel=2)

    def _check_lengths(self, questions: Sequence[Question]) -> None:
        limit = self.config.max_new_tokens
        for question in questions:
            check_length(question.prompt_ids, limit, self.student, f"question {question.id}")
            for name, teacher in self.teachers.items():
                ids = teacher_prompt_ids(teacher, self.tokenizer, question)
                model = getattr(teacher, "model", self.student)
                check_length(ids, limit, model, f"question {question.id} for teacher {name!r}")

    def run(
        self,
        rows: Sequence[Row],
        *,
        seed: int = 0,
        ids: Sequence[str] | None = None,
        responses: Sequence[Sequence[Sequence[int]]] | None = None,
        seconds: float | None = None,
        progress: Progress | None = None,
        metric: Preconditioner | None = None,
        journal: Journal | None = None,
    ) -> ProbeReport:
        """Measure on these rows.

        Nothing outside changes: weights, gradients, modes, adapters and random streams are as before.

        Args:
            rows: Questions, in TRL's convention.
            seed: Of everything random in the probe.
            ids: Identifies each question in the records; its ``id`` column or its place by default.
            responses: For each row, the student's own responses as token ids, where they have been sampled already
                (by the training, say); None samples them.
            seconds: Stop sampling continuations after this time, where the configuration limits them anyhow.
            progress: Called with stage, done, total.
            metric: Also measure in this geometry of the LoRA parameters: the same nodes and continuations, as the
                report's ``preconditioned``.
            journal: Keeps continuations as they finish, and gives back those of an interrupted probe with this seed,
                these rows and this student.
        """
        if seconds is not None and self.config.adaptive:
            shorter = copy(self)
            shorter.config = replace(self.config, seconds=min(seconds, self.config.seconds or seconds))
            return shorter.run(
                rows, seed=seed, ids=ids, responses=responses, progress=progress, metric=metric, journal=journal
            )
        check_student(self.student)  # merged, say, since the probe was made
        with preserving_training_state(self.student), closing(self._verifier):
            questions = as_questions(rows, self.tokenizer, ids)
            return self._run(questions, seed, responses, StageTimer(progress), metric, journal)

    def _run(
        self,
        questions: list[Question],
        seed: int,
        responses: Sequence[Sequence[Sequence[int]]] | None,
        timer: StageTimer,
        metric: Preconditioner | None,
        journal: Journal | None,
    ) -> ProbeReport:
        roots = None if metric is None else metric.roots(self.student)
        self._check_lengths(questions)
        config = self.config
        randomness = Randomness(seed)
        rollouts = self._rollouts(questions, responses, randomness, timer)
        nodes = select_nodes(config.selector, rollouts, randomness)
        spent = ContinuationCost()
        size = sum(p.numel() for p in lora_parameters(self.student).values())
        steps = [StepAccumulator(size, len(self.teachers))]
        if roots is not None:
            flat = torch.cat([root.flatten() for root in roots.values()])
            steps.append(StepAccumulator(size, len(self.teachers), flat))
        with timer.stage("branches", len(rollouts)):
            student_logits = self._student_logits(rollouts, nodes)
            if config.free:
                branches = [
                    taken_branches(rollouts[node.rollout], node, z, config.temperature)
                    for node, z in zip(nodes, student_logits, strict=True)
                ]
            else:
                tree, nodes, student_logits = self._tree(rollouts, nodes, student_logits, randomness, timer)
                branches = [tree.branches[g] for g in tree.group]
        projector = (int(config.projections or 0), randomness) if self._projects(rollouts, nodes, branches) else None
        records, preconditioned = self._gradients.at_nodes(
            rollouts, nodes, branches, student_logits, steps, timer, projector, roots
        )
        if config.free:
            records = from_rewards(rollouts, records)
        else:
            records, outcomes = self._continue(rollouts, tree, records, spent, randomness, timer, journal)
            if config.step_alignment:
                self._gradients.add_ideal(rollouts, records, outcomes, student_logits, steps, timer)
        sums = [step.sums() if config.step_alignment and not config.free else None for step in steps]
        settings = {"seed": seed, **config.plain(), "projections": projector[0] if projector else None}
        report = ProbeReport(
            teachers=tuple(self.teachers),
            modules=self.modules if projector is None else (ALL_MODULES,),
            rollouts=tuple(self._rollout_record(r) for r in rollouts),
            nodes=tuple(records),
            generated_tokens={
                "rollouts": sum(len(r.response_ids) for r in rollouts) if responses is None else 0,
                "continuations": spent.tokens,
            },
            continuations=spent.continuations,
            truncated=spent.truncated + sum(r.truncated for r in rollouts),
            seconds=timer.seconds,
            settings={**settings, "geometry": "euclidean"},
            step=sums[0],
            free=config.free,
            token_text={k: self.tokenizer.decode([k]) for k in sorted({int(k) for r in records for k in r.tokens})},
        )
        if metric is None:
            return report
        other = [replace(record, gram=gram) for record, gram in zip(records, preconditioned, strict=True)]
        settings["geometry"] = metric.name
        return replace(report, preconditioned=replace(report, nodes=tuple(other), step=sums[1], settings=settings))

    def _projects(self, rollouts: list[Rollout], nodes: list[Node], branches: list[list[Branch]]) -> bool:
        """Whether gradients are projected: where every token is a node, and that is cheaper."""
        if self.config.selector is not every_node or not nodes:
            return False
        positions: dict[int, list[int]] = {}
        counts: dict[int, list[int]] = {}
        for node, row in zip(nodes, branches, strict=True):
            positions.setdefault(node.rollout, []).extend(rollouts[node.rollout].positions([node.depth]))
            counts.setdefault(node.rollout, []).append(len(row) - 1 + len(self.teachers))
        lengths = [max(at) + 1 for at in positions.values()]
        cheaper = projection_is_cheaper(
            self.config.projections, lengths, list(positions.values()), list(counts.values())
        )
        return cheaper and supports_projection(self.student)

    def _rollouts(
        self,
        questions: list[Question],
        responses: Sequence[Sequence[Sequence[int]]] | None,
        randomness: Randomness,
        timer: StageTimer,
    ) -> list[Rollout]:
        """The student's rollouts, scored; with the entropy at each position if the node selector wants it."""
        config = self.config
        if responses is not None:
            rollouts = given_rollouts(self.tokenizer, questions, responses, config.max_new_tokens, self.eos_token_ids)
        else:
            with timer.stage("rollouts", len(questions) * config.rollouts_per_question):
                rollouts = sample_rollouts(
                    self.student,
                    self.tokenizer,
                    questions,
                    per_question=config.rollouts_per_question,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    eos_token_ids=self.eos_token_ids,
                    randomness=randomness,
                    batch_size=config.batch_size,
                )
        with timer.stage("verifier", len(rollouts)):
            rollouts = score_rollouts(self._verifier, rollouts)
        if not config.free:
            self._verifier.try_thread(
                [r.reward for r in rollouts],
                [r.question for r in rollouts],
                [r.text for r in rollouts],
                [r.response_ids for r in rollouts],
            )
        if getattr(config.selector, "uses_entropy", False):
            rollouts = [replace(r, entropy=self._entropy(r)) for r in rollouts]
        return rollouts

    def _entropy(self, rollout: Rollout) -> Tensor:
        """Of the student's policy at each position, ``(T,)`` in nats."""
        positions = [rollout.positions(range(len(rollout.response_ids)))]
        (logits,) = node_logits(self.student, [rollout.sequence], positions)
        logs = torch.log_softmax(logits.float() / self.config.temperature, dim=-1)
        return -(logs.exp() * logs).sum(dim=-1).cpu()

    def _tree(
        self,
        rollouts: list[Rollout],
        nodes: list[Node],
        student_logits: list[Tensor],
        randomness: Randomness,
        timer: StageTimer,
    ) -> tuple[ContinuationTree, list[Node], list[Tensor]]:
        """PrefilledRollouts with their branches; if the budget is too small for all, of nodes that are drawn."""
        tree = ContinuationTree(rollouts, nodes)
        branches = [
            choose_branches(
                torch.softmax(student_logits[first].double() / self.config.temperature, dim=-1),
                tree.taken(g),
                mass=self.config.branch_mass,
                most=self.config.max_branches,
                tail_draws=self.config.tail_draws,
                generator=randomness.generator(*tree.names[g], "branches"),
            )
            for g, first in enumerate(tree.first)
        ]
        if self.config.adaptive:
            cost = sum(
                remaining_length(rollouts, nodes[first].depth) * sum(b.token not in self.eos_token_ids for b in row)
                for first, row in zip(tree.first, branches, strict=True)
            )
            generator = np.random.default_rng(randomness.key("thin"))
            kept = subsample_nodes(nodes, tree, cost, self._tokens(timer, rollouts), generator)
            if len(kept) < len(nodes):
                places = {(node.rollout, node.depth): n for n, node in enumerate(nodes)}
                index = [places[node.rollout, node.depth] for node in kept]
                by_group = {tree.group[n]: branches[tree.group[n]] for n in index}
                # Taken anew, in the very batches in which the teachers' will be: equal policies must give equal bits.
                nodes, student_logits = kept, self._student_logits(rollouts, kept)
                tree, branches = ContinuationTree(rollouts, nodes), list(by_group.values())
        tree.set_branches(branches)
        return tree, nodes, student_logits

    def _tokens(self, timer: StageTimer, rollouts: list[Rollout]) -> float:
        """The budget in tokens, as fast as the rollouts were sampled."""
        limits = [float(self.config.budget)] if self.config.budget else []
        if self.config.seconds is not None and (taken := timer.seconds.get("rollouts")):
            limits.append(self.config.seconds * sum(len(r.response_ids) for r in rollouts) / taken)
        return min(limits, default=float("inf"))

    def _student_logits(self, rollouts: list[Rollout], nodes: list[Node]) -> list[Tensor]:
        """The student's logits at each node, ``(V,)``; question by question, as the teachers' are taken."""
        found: list[Tensor] = []
        for indices, depths in group_by_question(rollouts, nodes):
            prompts = [rollouts[i].question.prompt_ids for i in indices]
            responses = [rollouts[i].response_ids for i in indices]
            for logits in response_logits(self.student, prompts, responses, depths):
                found += list(logits)
        return found

    def _continue(
        self,
        rollouts: list[Rollout],
        tree: ContinuationTree,
        records: list[NodeRecord],
        spent: ContinuationCost,
        randomness: Randomness,
        timer: StageTimer,
        journal: Journal | None,
    ) -> tuple[list[NodeRecord], list[list[BranchOutcomes]]]:
        """Targeted continuations: as many of each branch, or where they help most within a budget."""
        config = self.config
        questions = list({id(r.question): r.question for r in rollouts}.values())
        place = {id(question): q for q, question in enumerate(questions)}
        # A rollout's last prompt token goes with its response: a branch at the root has seen all but that one.
        prefixes = prefill_rollouts(
            self.student,
            [q.prompt_ids[:-1] for q in questions],
            [r.sequence[len(r.question.prompt_ids) - 1 : -1] for r in rollouts],
            [place[id(r.question)] for r in rollouts],
        )

        begun, asked = time.perf_counter(), 0

        def sample(allocation: Any) -> None:
            nonlocal asked
            waited, before = spent.waited, asked
            asked += int(sum(map(sum, allocation)))
            here = range(before, asked)
            total = max(here.stop, planned_continuations(config, spent, time.perf_counter() - begun))
            with timer.stage("continuations", total, here) as progress:
                measure_success(
                    self.student,
                    self.tokenizer,
                    self._verifier,
                    prefixes,
                    tree,
                    allocation=[[int(n) for n in row] for row in allocation],
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    eos_token_ids=self.eos_token_ids,
                    randomness=randomness,
                    batch_size=config.batch_size,
                    memory=config.memory,
                    spent=spent,
                    progress=progress,
                    journal=journal,
                )
            timer.move("continuations", "verifier", spent.waited - waited)

        def seen() -> list[NodeRecord]:
            return [with_outcomes(record, tree.at(n)) for n, record in enumerate(records)]

        size = max(map(len, tree.branches), default=0)
        first = np.array([[int(b < len(row)) for b in range(size)] for row in tree.branches], dtype=np.int64)
        if not config.adaptive:
            sample([row[: len(branches)] * config.continuations for row, branches in zip(first, tree.branches)])
        elif tree.first:
            expected = np.array([remaining_length(rollouts, tree.nodes[n].depth) for n in tree.first])

            def width(evidence: Evidence) -> float:
                return half_width(evidence, config.target)

            spend_budget(
                config,
                first,
                spent,
                sample,
                lambda: read_allocation_state(tree, gather(seen()), expected),
                width,
                np.random.default_rng(randomness.key("rounds")),
            )
        outcomes = [tree.at(n) for n in range(len(records))]
        return [with_outcomes(record, row) for record, row in zip(records, outcomes, strict=True)], outcomes

    def _rollout_record(self, rollout: Rollout) -> RolloutRecord:
        return RolloutRecord(
            question=rollout.question.id,
            prompt=self.tokenizer.decode(rollout.question.prompt_ids),
            pieces=tuple(self.tokenizer.decode([token]) for token in rollout.response_ids),
            text=rollout.text,
            reward=rollout.reward,
            correct=rollout.reward >= self.config.success_threshold,
            truncated=rollout.truncated,
        )


def diagnose(
    student: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    teachers: object,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    **config: Any,
) -> ProbeReport:
    """Training-free diagnosis: measure each teacher's alignment on the student's own rollouts.

    Args:
        student: Causal language model with LoRA (peft).
        tokenizer: Its tokenizer.
        rows: Questions, in TRL's convention.
        reward: The verifier, a TRL reward function.
        teachers: Teachers by name.
        seed: Of everything random.
        progress: Called with stage, done, total.
        **config: Fields of :class:`ProbeConfig`.

    Raises:
        ValueError: If an argument is of no use; it says which, and what would work.
    """
    probe = Probe(student, tokenizer, reward, teachers, ProbeConfig(**config))
    probe.validate(rows)
    return probe.run(rows, seed=seed, progress=progress)
