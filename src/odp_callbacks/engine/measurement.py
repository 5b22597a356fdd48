"""One run of a probe: the stages from questions to a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from odp_callbacks.analysis.teacher_coverage import COVERAGE_SETTING
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.engines.student_engine import StudentEngine
from odp_callbacks.engine.gradients.graph_trial import check_graph
from odp_callbacks.engine.gradients.node_gradients import NodeDifferentiator
from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.gradients.random_projection import (
    ALL_MODULES,
)
from odp_callbacks.engine.gradients.step_sums import StepAccumulator
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.node_measurement import NodeMeasurement
from odp_callbacks.engine.node_time import NodeTime
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import (
    Rollout,
    given_rollouts,
    reached_limit,
    sample_rollouts,
    score_rollouts,
    scored_rollouts,
    try_thread,
    with_entropy,
    with_given_rewards,
)
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teachers import ServedTeacher
from odp_callbacks.engine.time_plan import TimePlan
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.tree.continuations import ContinuationCost
from odp_callbacks.engine.unit_costs import UnitCosts, work_of_sequences
from odp_callbacks.engine.update.cost_trial import try_update
from odp_callbacks.engine.update.failures import measured_or_none
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.measurement import UpdateMeasurement, UpdateMeter
from odp_callbacks.engine.update.update_time import GAIN
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.functional.gradients import lora_parameters
from odp_callbacks.records import Floats, NodeRecord, ProbeReport, RolloutRecord
from odp_callbacks.update_records import UpdateRecord


@dataclass(frozen=True)
class Measurement:
    """The stages of one run of a probe: rollouts, nodes and branches, gradients, continuations, report.

    Attributes:
        student: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        config: The configuration of this run.
        differentiator: Computes teachers' logits and gradients.
        verifier: Scores responses.
        eos_token_ids: Tokens that end a response.
        modules: Names of the student's LoRA modules.
        seed: Seed of everything random.
        timer: Times the stages and reports their progress.
        journal: Stores rollouts and continuations as they finish.
        preconditioner: A second geometry of the LoRA parameters to measure in; None for the Euclidean one alone.
        summed_directions: Filled with each teacher's summed distillation gradient if the update is measured; None: not
            kept.
        deadline: When the probe must have ended.
        costs: What units of work take, as far as known; it receives what this run measures.
        engine: Samples rollouts and continuations in place of the student's own model; None: that model does.
    """

    student: nn.Module
    tokenizer: Any
    config: ProbeConfig
    differentiator: NodeDifferentiator
    verifier: Verifier
    eos_token_ids: tuple[int, ...]
    modules: tuple[str, ...]
    seed: int
    timer: StageTimer
    journal: Journal | None = None
    preconditioner: Preconditioner | None = None
    summed_directions: dict[str, Tensor] | None = None
    deadline: Deadline = field(default_factory=Deadline)
    costs: UnitCosts = field(default_factory=UnitCosts)
    engine: StudentEngine | None = None

    @cached_property
    def plan(self) -> TimePlan:
        """The deadlines of the stages."""
        return TimePlan(self.config, self.deadline, self.costs, self.randomness)

    @cached_property
    def update_gradients(self) -> UpdateGradients:
        """Computes the gradients of the update."""
        return UpdateGradients(
            self.student,
            self.tokenizer,
            self.differentiator.teachers,
            self.differentiator.direction,
            self.config.temperature,
            features=self.config.influence or bool(self.config.rules),
            max_memory_bytes=self.config.max_memory_bytes,
        )

    @property
    def served_teachers(self) -> dict[str, ServedTeacher]:
        """The teachers behind servers, by name."""
        teachers = self.differentiator.teachers
        return {name: teacher for name, teacher in teachers.items() if isinstance(teacher, ServedTeacher)}

    @property
    def randomness(self) -> Randomness:
        """The source of all random draws; each is a function of the seed and of a name."""
        return Randomness(self.seed)

    def run(
        self,
        questions: Sequence[Question],
        responses: Sequence[Sequence[Sequence[int]]] | None = None,
        rewards: Sequence[Sequence[float | None]] | None = None,
    ) -> ProbeReport:
        """Run all stages.

        Args:
            questions: The questions, with the teachers' prompts.
            responses: For each question, the student's responses as token ids if they exist already; None samples
                them.
            rewards: For each question, the rewards of these responses where they exist already; None where the verifier
                shall score.
        """
        check_graph(self.student)
        self.try_update(questions)
        for teacher in self.served_teachers.values():
            teacher.begin_probe()
        if responses is None or self.config.measures_nodes:
            self.prepare_engine(questions)
        sampled = self.score(questions, responses, rewards)
        limit = None if responses is not None else reached_limit(sampled, self.config.max_new_tokens)
        # Continuations have the limit that rollouts have had: success means the same for both.
        limited = self if limit is None else replace(self, config=replace(self.config, max_new_tokens=limit))
        report = limited.measure(sampled, rollouts_are_given=responses is not None)
        missing = len(questions) - len({id(rollout.question) for rollout in sampled})
        left_out = {**report.left_out, "unsampled_questions": missing} if missing else report.left_out
        if not self.deadline.is_finite:
            return report
        limits = {"seconds": self.deadline.seconds, "response_limit": limit}
        settings = {**report.settings, "max_new_tokens": self.config.max_new_tokens, **limits}
        return replace(report, left_out=left_out, settings=settings)

    def measure(self, sampled: Sequence[Rollout], rollouts_are_given: bool) -> ProbeReport:
        """Measure the update and the nodes of rollouts, and report.

        Args:
            sampled: The rollouts with their rewards.
            rollouts_are_given: Whether they existed before, so that they cost no tokens.
        """
        config = self.config
        rollouts = scored_rollouts(sampled)
        left_out = {
            "questions": len({id(rollout.question) for rollout in sampled} - {id(one.question) for one in rollouts}),
            "responses": len(sampled) - len(rollouts),
        }
        square_roots = None if self.preconditioner is None else self.preconditioner.square_roots(self.student)
        rollout_tokens = sum(len(rollout.response_ids) for rollout in sampled) if not rollouts_are_given else 0
        node_time = NodeTime(self.plan, self.student, len(self.differentiator.teachers), self.served_teachers)
        if config.update and config.measures_nodes and not node_time.fits(rollouts):
            # Nothing is kept for nodes, so that the update gets all the time.
            left_out["questions_without_nodes"] = len({id(rollout.question) for rollout in rollouts})
            config = replace(config, budget=0, half_width=None)
        limited = self if config is self.config else replace(self, config=config)
        update = limited.measure_update(rollouts, square_roots, left_out) if config.update else None
        with_nodes = node_time.affordable(rollouts) if config.measures_nodes else []
        left_out |= node_time.left_out
        if not with_nodes:
            report = self.report(rollouts, [], ContinuationCost(), None, [], None, rollout_tokens, update)
            return replace(report, left_out=left_out)
        accumulators = self.step_accumulators(square_roots)
        measurement = limited.node_measurement(square_roots, node_time)
        nodes = measurement.measure([rollouts[index] for index in with_nodes], accumulators)
        report = self.report(
            rollouts,
            [replace(record, rollout=with_nodes[record.rollout]) for record in nodes.records],
            nodes.cost,
            accumulators if nodes.has_steps else None,
            nodes.preconditioned_grams,
            nodes.projections,
            rollout_tokens,
            update,
        )
        left_out |= node_time.left_out
        left_out["responses"] += nodes.cost.unscored
        if nodes.cost.is_cut:
            left_out["continuations"] = nodes.cost.cut
        return replace(report, left_out=left_out)

    def node_measurement(self, square_roots: Mapping[str, Tensor] | None, node_time: NodeTime) -> NodeMeasurement:
        """What measures single tokens.

        Args:
            square_roots: Of the preconditioner.
            node_time: The time for these stages.
        """
        return NodeMeasurement(
            self.student,
            self.tokenizer,
            self.config,
            self.differentiator,
            self.verifier,
            self.eos_token_ids,
            self.randomness,
            self.timer,
            self.journal,
            square_roots,
            node_time if self.deadline.is_finite else None,
            self.engine,
        )

    def measure_update(
        self, rollouts: Sequence[Rollout], square_roots: Mapping[str, Tensor] | None, left_out: dict[str, int]
    ) -> UpdateMeasurement | None:
        """Measure update gain, and the influence of every token where that is asked for.

        Args:
            rollouts: The rollouts.
            square_roots: Of the preconditioner.
            left_out: Receives what there was no time for.

        Returns:
            What was measured; None if there was no time for one question, or with a warning if the gradients failed.
        """
        config, differentiator = self.config, self.differentiator
        time = self.plan.for_update()
        meter = UpdateMeter(
            self.update_gradients, success_threshold=config.success_threshold, max_memory_bytes=config.max_memory_bytes
        )
        total = len(rollouts) * (1 + config.influence + len(config.rules or ()))
        with self.timer.stage("update", total) as progress:
            measured = measured_or_none(
                lambda: meter.measure(
                    rollouts,
                    influence=config.influence,
                    rules=config.rules,
                    square_roots=square_roots,
                    progress=progress,
                    time=time,
                ),
                "the update",
            )
        has_failed = measured is None and time.questions > 0
        if self.deadline.is_finite and not has_failed:
            question_count = len({id(rollout.question) for rollout in rollouts})
            missing = question_count - time.questions
            left_out |= {"questions_without_update": missing} if missing else {}
            left_out |= {f"updates_without_{kind}": 1 for kind in time.dropped}
        if self.summed_directions is not None and measured is not None:
            self.summed_directions.update(zip(differentiator.teachers, measured.directions, strict=True))
        return measured

    def score(
        self,
        questions: Sequence[Question],
        responses: Sequence[Sequence[Sequence[int]]] | None,
        rewards: Sequence[Sequence[float | None]] | None = None,
    ) -> list[Rollout]:
        """Sample rollouts, or take those that are given, and score them.

        The rollouts have their entropies if the node selector uses them.
        """
        config = self.config
        if responses is not None:
            rollouts = given_rollouts(self.tokenizer, questions, responses, config.max_new_tokens, self.eos_token_ids)
        else:
            with self.timer.stage("rollouts", len(questions) * config.rollouts):
                order = self.plan.order(len(questions))
                rollouts = sample_rollouts(
                    self.student,
                    self.tokenizer,
                    [questions[place] for place in order],
                    per_question=config.rollouts,
                    max_new_tokens=self.plan.longest_rollout(self.prompt_work(questions)),
                    temperature=config.temperature,
                    eos_token_ids=self.eos_token_ids,
                    randomness=self.randomness,
                    batch_size=config.batch_size,
                    journal=self.journal,
                    deadline=self.plan.for_rollouts(self.prompt_work(questions)),
                    costs=self.costs,
                    engine=self.engine,
                )
                place_of = {id(question): place for place, question in enumerate(questions)}
                rollouts.sort(key=lambda rollout: place_of[id(rollout.question)])
        with self.timer.stage("verifier", len(rollouts)):
            if rewards is None:
                rollouts = score_rollouts(self.verifier, rollouts)
            else:
                rollouts = with_given_rewards(self.verifier, rollouts, rewards)
        if config.measures_nodes:
            try_thread(self.verifier, rollouts)
        if getattr(config.selector, "uses_entropy", False):
            rollouts = [with_entropy(rollout, self.student, config.temperature) for rollout in rollouts]
        return rollouts

    def prompt_work(self, questions: Sequence[Question]) -> list[float]:
        """The work of one pass over each question's prompt."""
        return work_of_sequences(self.student, [len(question.prompt_ids) for question in questions])

    def prepare_engine(self, questions: Sequence[Question]) -> None:
        """Give the engine the student as it is now, if another one than the student's own model samples."""
        if self.engine is not None:
            with self.timer.stage("engine", 1):
                self.engine.prepare(
                    questions,
                    max_new_tokens=self.config.max_new_tokens,
                    stop_token_ids=self.eos_token_ids,
                    randomness=self.randomness,
                )

    def try_update(self, questions: Sequence[Question]) -> None:
        """Find out what the update will take, unless that is known: how much is sampled depends on it."""
        if self.deadline.is_finite and questions and not self.costs.knows(GAIN):
            with self.timer.stage("cost_trial", 1):
                try_update(self.update_gradients, questions[0], self.config.max_new_tokens, self.costs, self.deadline)

    def step_accumulators(self, square_roots: Mapping[str, Tensor] | None) -> list[StepAccumulator]:
        """Make the sums of gradients for the step alignment: Euclidean, and preconditioned where that is asked for."""
        size = sum(parameter.numel() for parameter in lora_parameters(self.student).values())
        teacher_count = len(self.differentiator.teachers)
        accumulators = [StepAccumulator(size, teacher_count)]
        if square_roots is not None:
            scale = torch.cat([square_root.flatten() for square_root in square_roots.values()])
            accumulators.append(StepAccumulator(size, teacher_count, scale))
        return accumulators

    def report(
        self,
        rollouts: Sequence[Rollout],
        records: Sequence[NodeRecord],
        cost: ContinuationCost,
        accumulators: Sequence[StepAccumulator] | None,
        preconditioned_grams: Sequence[Floats],
        projections: int | None,
        rollout_tokens: int,
        update: UpdateMeasurement | None,
    ) -> ProbeReport:
        """Make the report; with a preconditioner, it holds a second one in that geometry."""
        config = self.config
        has_steps = config.step_alignment and accumulators is not None
        step_sums = [accumulator.sums() for accumulator in accumulators or ()] if has_steps else [None, None]
        settings = {"seed": self.seed, **config.settings(), "projections": projections}
        if served := self.served_teachers:
            settings[COVERAGE_SETTING] = {name: teacher.coverage.as_setting() for name, teacher in served.items()}
        branch_tokens = sorted({int(token) for record in records for token in record.tokens})
        report = ProbeReport(
            teachers=tuple(self.differentiator.teachers),
            modules=self.modules if projections is None else (ALL_MODULES,),
            rollouts=tuple(self.rollout_record(rollout) for rollout in rollouts),
            nodes=tuple(records),
            generated_tokens={"rollouts": rollout_tokens, "continuations": cost.tokens},
            continuations=cost.continuations,
            truncated=cost.truncated + sum(rollout.truncated for rollout in rollouts),
            stage_seconds=self.timer.seconds,
            slot_steps={"occupied": cost.slot_use.occupied, "available": cost.slot_use.available},
            settings={**settings, "geometry": "euclidean"},
            step=step_sums[0],
            updates=() if update is None else (update.record,),
            token_text={token: self.tokenizer.decode([token]) for token in branch_tokens},
        )
        if self.preconditioner is None:
            return report
        preconditioned = replace(
            report,
            nodes=tuple(replace(record, gram=gram) for record, gram in zip(records, preconditioned_grams, strict=True)),
            step=step_sums[1],
            updates=() if update is None or update.preconditioned is None else (UpdateRecord(update.preconditioned),),
            settings={**settings, "geometry": self.preconditioner.name},
        )
        return replace(report, preconditioned=preconditioned)

    def rollout_record(self, rollout: Rollout) -> RolloutRecord:
        """Make the record of a rollout."""
        return RolloutRecord(
            question=rollout.question.id,
            prompt=self.tokenizer.decode(rollout.question.prompt_ids),
            pieces=tuple(self.tokenizer.decode([token]) for token in rollout.response_ids),
            text=rollout.text,
            reward=rollout.reward,
            correct=rollout.reward >= self.config.success_threshold,
            truncated=rollout.truncated,
        )
