"""The stages of a probe that measure single tokens: nodes, branches, continuations, and gradients where they matter."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.engines.student_engine import StudentEngine
from odp_callbacks.engine.gradients.gradient_stage import GradientStage, GradientWarning
from odp_callbacks.engine.gradients.node_gradients import NodeDifferentiator
from odp_callbacks.engine.gradients.node_logits import NodeLogits
from odp_callbacks.engine.gradients.step_sums import StepAccumulator
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.node_time import NodeTime
from odp_callbacks.engine.rollouts import Rollout, question_indices
from odp_callbacks.engine.sampling.backends import PrefilledRollouts, prefill_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes
from odp_callbacks.engine.tree.continuations import ContinuationCost, ContinuationSampler
from odp_callbacks.engine.tree.contributions import draw_factors, expected_contributions
from odp_callbacks.engine.tree.nodes import Node, select_nodes
from odp_callbacks.engine.tree.planning import (
    CANDIDATES,
    EXPLORATION_SHARE,
    MeasuredNodes,
    plan_branches,
    proposals_of_teachers,
    thin_nodes,
)
from odp_callbacks.engine.tree.quiet_questions import thin_quiet_questions
from odp_callbacks.engine.tree.recording import is_scored, with_outcomes, without_unscored
from odp_callbacks.engine.tree.stream import ContinuationStream
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.records import Floats, NodeRecord
from odp_callbacks.text import short_reason


@dataclass(frozen=True)
class NodeResults:
    """What was measured at the nodes of a probe.

    Attributes:
        records: One record for each node.
        preconditioned_grams: Gram matrices of each node under the preconditioner; empty without one.
        cost: What the continuations cost.
        projections: Number of random directions that gradients were projected on; None where they are exact.
        has_steps: Whether the gradients were added to the step sums.
    """

    records: list[NodeRecord] = field(default_factory=list)
    preconditioned_grams: list[Floats] = field(default_factory=list)
    cost: ContinuationCost = field(default_factory=ContinuationCost)
    projections: int | None = None
    has_steps: bool = False


@dataclass(frozen=True)
class NodeMeasurement:
    """Measures single tokens of a probe's rollouts.

    Continuations come before gradients. Where all branches of a node succeed alike, the ideal gradient is estimated as
    zero, and no teacher's gradient is needed to know that it gains nothing.

    Attributes:
        student: The student, in evaluation mode.
        tokenizer: Its tokenizer.
        config: The configuration of this run.
        differentiator: Computes gradients.
        verifier: Scores responses.
        eos_token_ids: Tokens that end a response.
        randomness: The source of all random draws.
        timer: Times the stages and reports their progress.
        journal: Stores continuations as they finish.
        square_roots: Of a preconditioner to measure with, too.
        time: The time for these stages; None for no limit.
        engine: Samples continuations in place of the student's own model; None: that model does.
    """

    student: nn.Module
    tokenizer: Any
    config: ProbeConfig
    differentiator: NodeDifferentiator
    verifier: Verifier
    eos_token_ids: tuple[int, ...]
    randomness: Randomness
    timer: StageTimer
    journal: Journal | None = None
    square_roots: Mapping[str, Tensor] | None = None
    time: NodeTime | None = None
    engine: StudentEngine | None = None

    def measure(self, rollouts: list[Rollout], accumulators: Sequence[StepAccumulator]) -> NodeResults:
        """Run the stages.

        Args:
            rollouts: The probe's rollouts.
            accumulators: Receive the gradients of the nodes, if the step alignment is measured.
        """
        measured = self.choose_branches(rollouts)
        with self.timer.stage("branches", *_part(3)):
            records = self.differentiator.describe_nodes(measured)
        gradients = GradientStage(
            self.differentiator,
            self.timer,
            self.randomness,
            self.square_roots,
            self.time,
            rollouts=rollouts,
            measured=measured,
            records=records,
        )
        sampler = self.sampler(rollouts, measured)
        stream = ContinuationStream(
            sampler,
            np.random.default_rng(self.randomness.key("allocation")),
            self.timer,
            gradients.where_outcomes_differ,
            None if self.time is None else self.time.for_continuations(rollouts, measured),
        )
        outcomes = stream.run(records)
        records = [
            with_outcomes(record, node_outcomes) for record, node_outcomes in zip(records, outcomes, strict=True)
        ]
        records, preconditioned = gradients.compute(records)
        with_nodes = [rollouts[index] for index in sorted({node.rollout for node in measured.nodes})]
        has_steps = self.config.step_alignment and (self.time is None or self.time.allows_step(with_nodes))
        if has_steps:
            has_steps = self.add_step_gradients(measured, records, outcomes, accumulators)
        is_cut = sampler.cost.is_cut or (self.time is not None and bool(self.time.left_out))
        records, preconditioned = without_unscored(records, preconditioned, is_cut=is_cut)
        return NodeResults(records, preconditioned, sampler.cost, gradients.projections, has_steps)

    def choose_branches(self, rollouts: list[Rollout]) -> MeasuredNodes:
        """Select the nodes, as many as the budget allows, and choose their branches."""
        config, stage = self.config, self.timer.stage
        nodes = select_nodes(config.selector, rollouts, self.randomness)
        nodes = thin_quiet_questions(rollouts, nodes, self.randomness.generator("quiet"))
        with stage("branches", *_part(0)):
            logits = self.logits(rollouts, nodes)
        with stage("branches", *_part(1)):
            logits = self.thin(rollouts, logits, "candidates", share=CANDIDATES * EXPLORATION_SHARE)
        with stage("teachers", len(rollouts)):
            logits.compute_ahead()
        with stage("branches", *_part(2)):
            proposals = proposals_of_teachers(logits, config)
            if config.adaptive or self.time is not None:
                contributions = expected_contributions(logits, self.differentiator.direction, config.temperature)
                factors = draw_factors(logits.nodes, contributions)
                proposed = {
                    (node.rollout, node.depth): tokens for node, tokens in zip(logits.nodes, proposals, strict=True)
                }
                logits = self.thin(rollouts, logits, "nodes", proposals=proposals, factors=factors)
                proposals = [proposed[node.rollout, node.depth] for node in logits.nodes]
            return plan_branches(rollouts, logits, proposals, config, self.randomness)

    def thin(self, rollouts: Sequence[Rollout], logits: NodeLogits, draw: str, **options: Any) -> NodeLogits:
        """Subsample nodes by :func:`thin_nodes`, and keep their logits.

        Args:
            rollouts: The probe's rollouts.
            logits: The logits at the nodes.
            draw: Name of the random draw.
            options: Of :func:`thin_nodes`.
        """
        nodes = thin_nodes(
            rollouts,
            logits,
            self.config,
            eos_token_ids=self.eos_token_ids,
            token_budget=float(self.config.budget or "inf"),
            generator=self.randomness.generator("thin", draw),
            randomness=self.randomness,
            time=self.time,
            **options,
        )
        return logits if len(nodes) == len(logits.nodes) else self.logits(rollouts, nodes, logits)

    def logits(
        self, rollouts: Sequence[Rollout], nodes: Sequence[Node], source: NodeLogits | None = None
    ) -> NodeLogits:
        """Compute the student's logits at nodes; the teachers' are computed when they are needed.

        Args:
            rollouts: The probe's rollouts.
            nodes: The nodes.
            source: Logits of more nodes, of which those that are kept are taken.
        """
        max_memory_bytes = self.config.max_memory_bytes
        return NodeLogits(self.student, self.differentiator.teachers, rollouts, nodes, max_memory_bytes, source)

    def sampler(self, rollouts: Sequence[Rollout], measured: MeasuredNodes) -> ContinuationSampler:
        """Make the sampler of continuations, which start from the rollouts with nodes."""
        with_nodes = sorted({node.rollout for node in measured.nodes})
        return ContinuationSampler(
            self.student,
            self.tokenizer,
            self.verifier,
            self.prefill([rollouts[index] for index in with_nodes]),
            measured.tree,
            self.config,
            self.eos_token_ids,
            self.randomness,
            self.journal,
            sequences={rollout: place for place, rollout in enumerate(with_nodes)},
        )

    def prefill(self, rollouts: Sequence[Rollout]) -> PrefilledRollouts:
        """Compute the keys and values of rollouts, each prompt once."""
        questions = list({id(rollout.question): rollout.question for rollout in rollouts}.values())
        # A rollout's last prompt token belongs to its response: a branch at depth 0 must not see it twice.
        return prefill_rollouts(
            self.student,
            [question.prompt_ids[:-1] for question in questions],
            [rollout.sequence[len(rollout.question.prompt_ids) - 1 : -1] for rollout in rollouts],
            question_indices(rollouts),
            max_new_tokens=self.config.max_new_tokens,
            engine=self.engine,
        )

    def add_step_gradients(
        self,
        measured: MeasuredNodes,
        records: Sequence[NodeRecord],
        outcomes: Sequence[list[BranchOutcomes]],
        accumulators: Sequence[StepAccumulator],
    ) -> bool:
        """Add the gradients of all nodes to the step sums.

        Returns:
            Whether all could be computed. What continuations have cost is not lost to an error here.
        """
        try:
            self.differentiator.add_step_gradients(measured, records, outcomes, accumulators, self.timer)
        except Exception as error:
            warnings.warn(
                "the gradients of the step alignment could not be computed, so the report has no step alignment; all "
                f"else is in it ({short_reason(error)}).",
                category=GradientWarning,
                stacklevel=2,
            )
            for accumulator in accumulators:
                accumulator.leave_out(records)
            return False
        for accumulator in accumulators:
            accumulator.leave_out(record for record in records if not is_scored(record))
        return True


def _part(number: int) -> tuple[int, range]:
    """Total and part of the stage ``"branches"``, whose four parts lie between other stages."""
    return 4, range(number, number + 1)
