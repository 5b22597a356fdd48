"""One run of a probe: the stages from questions to a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.node_gradients import NodeDifferentiator
from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.gradients.random_projection import (
    ALL_MODULES,
    RandomProjection,
    projection_is_cheaper,
    supports_projection,
)
from odp_callbacks.engine.gradients.step_sums import StepAccumulator
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import (
    Rollout,
    given_rollouts,
    question_indices,
    sample_rollouts,
    score_rollouts,
    scored_rollouts,
    with_entropy,
    with_given_rewards,
)
from odp_callbacks.engine.sampling.backends import PrefilledRollouts, prefill_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.tree.continuations import ContinuationCost, ContinuationSampler
from odp_callbacks.engine.tree.nodes import Node, every_node, select_nodes
from odp_callbacks.engine.tree.planning import MeasuredNodes, plan_branches
from odp_callbacks.engine.tree.recording import is_scored, with_outcomes, without_unscored
from odp_callbacks.engine.tree.rounds import SamplingRounds
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.measurement import UpdateMeasurement, UpdateMeter
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
        config = self.config
        sampled = self.score(questions, responses, rewards)
        rollouts = scored_rollouts(sampled)
        left_out = {
            "questions": len({id(rollout.question) for rollout in sampled} - {id(one.question) for one in rollouts}),
            "responses": len(sampled) - len(rollouts),
        }
        square_roots = None if self.preconditioner is None else self.preconditioner.square_roots(self.student)
        rollout_tokens = sum(len(rollout.response_ids) for rollout in sampled) if responses is None else 0
        update = self.measure_update(rollouts, square_roots) if config.update else None
        if not config.measures_nodes:
            report = self.report(rollouts, [], ContinuationCost(), None, [], None, rollout_tokens, update)
            return replace(report, left_out=left_out)
        nodes = select_nodes(config.selector, rollouts, self.randomness)
        accumulators = self.step_accumulators(square_roots)
        measured = self.choose_branches(rollouts, nodes)
        projections = self.projections(rollouts, measured)
        records, preconditioned_grams = self.differentiator.measure_nodes(
            rollouts,
            measured,
            accumulators,
            self.timer,
            projection=RandomProjection(projections, self.randomness) if projections else None,
            square_roots=square_roots,
        )
        cost, records = self.measure_success(rollouts, measured, records, accumulators)
        for accumulator in accumulators:
            accumulator.leave_out(record for record in records if not is_scored(record))
        records, preconditioned_grams = without_unscored(records, preconditioned_grams)
        report = self.report(
            rollouts,
            records,
            cost,
            accumulators,
            preconditioned_grams,
            projections,
            rollout_tokens,
            update,
        )
        return replace(report, left_out={**left_out, "responses": left_out["responses"] + cost.unscored})

    def measure_update(
        self, rollouts: Sequence[Rollout], square_roots: Mapping[str, Tensor] | None
    ) -> UpdateMeasurement:
        """Measure update gain, and the influence of every token where that is asked for."""
        config, differentiator = self.config, self.differentiator
        gradients = UpdateGradients(
            self.student,
            self.tokenizer,
            differentiator.teachers,
            differentiator.direction,
            config.temperature,
            features=config.influence or bool(config.rules),
        )
        meter = UpdateMeter(
            gradients, success_threshold=config.success_threshold, max_memory_bytes=config.max_memory_bytes
        )
        total = len(rollouts) * (1 + config.influence + len(config.rules or ()))
        with self.timer.stage("update", total) as progress:
            measured = meter.measure(
                rollouts,
                influence=config.influence,
                rules=config.rules,
                square_roots=square_roots,
                progress=progress,
            )
        if self.summed_directions is not None:
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
            with self.timer.stage("rollouts", len(questions) * config.rollouts_per_question):
                rollouts = sample_rollouts(
                    self.student,
                    self.tokenizer,
                    questions,
                    per_question=config.rollouts_per_question,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    eos_token_ids=self.eos_token_ids,
                    randomness=self.randomness,
                    batch_size=config.batch_size,
                    journal=self.journal,
                )
        with self.timer.stage("verifier", len(rollouts)):
            if rewards is None:
                rollouts = score_rollouts(self.verifier, rollouts)
            else:
                rollouts = with_given_rewards(self.verifier, rollouts, rewards)
        if config.measures_nodes:
            self.verifier.try_thread(
                [rollout.reward for rollout in rollouts],
                [rollout.question for rollout in rollouts],
                [rollout.text for rollout in rollouts],
                [rollout.response_ids for rollout in rollouts],
            )
        if getattr(config.selector, "uses_entropy", False):
            rollouts = [with_entropy(rollout, self.student, config.temperature) for rollout in rollouts]
        return rollouts

    def step_accumulators(self, square_roots: Mapping[str, Tensor] | None) -> list[StepAccumulator]:
        """Make the sums of gradients for the step alignment: Euclidean, and preconditioned where that is asked for."""
        size = sum(parameter.numel() for parameter in lora_parameters(self.student).values())
        teacher_count = len(self.differentiator.teachers)
        accumulators = [StepAccumulator(size, teacher_count)]
        if square_roots is not None:
            scale = torch.cat([square_root.flatten() for square_root in square_roots.values()])
            accumulators.append(StepAccumulator(size, teacher_count, scale))
        return accumulators

    def choose_branches(self, rollouts: list[Rollout], nodes: list[Node]) -> MeasuredNodes:
        """Choose the branches of the nodes; nodes are subsampled if the budget is too small for all of them."""
        with self.timer.stage("branches", len(rollouts)):
            return plan_branches(
                self.student,
                rollouts,
                nodes,
                self.config,
                eos_token_ids=self.eos_token_ids,
                token_budget=self.token_budget(rollouts),
                randomness=self.randomness,
            )

    def token_budget(self, rollouts: Sequence[Rollout]) -> float:
        """Return the budget in tokens; a time budget is converted at the speed at which rollouts were sampled."""
        limits = [float(self.config.budget)] if self.config.budget else []
        if self.config.time_budget is not None and (seconds := self.timer.seconds.get("rollouts")):
            tokens = sum(len(rollout.response_ids) for rollout in rollouts)
            limits.append(self.config.time_budget * tokens / seconds)
        return min(limits, default=float("inf"))

    def projections(self, rollouts: Sequence[Rollout], measured: MeasuredNodes) -> int | None:
        """Return the number of random directions to project gradients on; None where they are computed exactly.

        Gradients are projected where every token is a node and that is cheaper.
        """
        if self.config.selector is not every_node or not measured.nodes:
            return None
        positions: dict[int, list[int]] = {}
        direction_counts: dict[int, list[int]] = {}
        for node, branches in zip(measured.nodes, measured.branches, strict=True):
            positions.setdefault(node.rollout, []).extend(rollouts[node.rollout].positions([node.depth]))
            direction_counts.setdefault(node.rollout, []).append(len(branches) - 1 + len(self.differentiator.teachers))
        lengths = [max(rollout_positions) + 1 for rollout_positions in positions.values()]
        is_cheaper = projection_is_cheaper(
            self.config.projections, lengths, list(positions.values()), list(direction_counts.values())
        )
        return self.config.projections if is_cheaper and supports_projection(self.student) else None

    def measure_success(
        self,
        rollouts: list[Rollout],
        measured: MeasuredNodes,
        records: list[NodeRecord],
        accumulators: Sequence[StepAccumulator],
    ) -> tuple[ContinuationCost, list[NodeRecord]]:
        """Measure the success of all branches by continuations, and add the ideal gradients to the sums."""
        sampler = ContinuationSampler(
            self.student,
            self.tokenizer,
            self.verifier,
            self.prefill(rollouts),
            measured.tree,
            self.config,
            self.eos_token_ids,
            self.randomness,
            self.journal,
        )
        rounds = SamplingRounds(sampler, np.random.default_rng(self.randomness.key("rounds")), self.timer)
        outcomes = rounds.run(records)
        records = [
            with_outcomes(record, node_outcomes) for record, node_outcomes in zip(records, outcomes, strict=True)
        ]
        if self.config.step_alignment:
            self.differentiator.add_ideal_gradients(rollouts, measured, records, outcomes, accumulators, self.timer)
        return sampler.cost, records

    def prefill(self, rollouts: Sequence[Rollout]) -> PrefilledRollouts:
        """Compute the keys and values of all rollouts, each prompt once."""
        questions = list({id(rollout.question): rollout.question for rollout in rollouts}.values())
        # A rollout's last prompt token belongs to its response: a branch at depth 0 must not see it twice.
        return prefill_rollouts(
            self.student,
            [question.prompt_ids[:-1] for question in questions],
            [rollout.sequence[len(rollout.question.prompt_ids) - 1 : -1] for rollout in rollouts],
            question_indices(rollouts),
            max_new_tokens=self.config.max_new_tokens,
        )

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
