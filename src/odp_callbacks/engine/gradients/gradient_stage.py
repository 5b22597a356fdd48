"""The stage that computes gradients, once it is known where outcomes differ."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from odp_callbacks.engine.gradients.gradient_nodes import draw_gradient_nodes, gradient_probabilities, outcomes_differ
from odp_callbacks.engine.gradients.node_gradients import NodeDifferentiator
from odp_callbacks.engine.gradients.random_projection import (
    RandomProjection,
    projection_is_cheaper,
    supports_projection,
)
from odp_callbacks.engine.node_time import NodeTime
from odp_callbacks.engine.rollouts import Rollout, question_indices
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.timing import StageTimer
from odp_callbacks.engine.tree.nodes import every_node
from odp_callbacks.engine.tree.planning import MeasuredNodes
from odp_callbacks.engine.tree.recording import is_scored, without_outcomes
from odp_callbacks.records import Floats, NodeRecord
from odp_callbacks.text import short_reason


class GradientWarning(UserWarning):
    """Gradients could not be computed, and the report keeps what else was measured; ``strict`` makes it an error."""


class GradientStage:
    """Computes the gradients of the nodes where outcomes differ, each once.

    Args:
        differentiator: Computes gradients.
        timer: Times the stage ``"gradients"``.
        randomness: The source of all random draws.
        square_roots: Of a preconditioner to measure with, too.
        time: The time for gradients; None for no limit.
        rollouts: The probe's rollouts.
        measured: The nodes.
        records: Their records, without outcomes.

    Attributes:
        projections: Number of random directions that gradients are projected on; None where they are exact. It is
            decided when the first gradients are computed.
        failures: By node, the error that kept its gradients from being computed. The continuations of such a node stay
            in its record, and figures that need its gradients are NaN.
    """

    def __init__(
        self,
        differentiator: NodeDifferentiator,
        timer: StageTimer,
        randomness: Randomness,
        square_roots: Mapping[str, Tensor] | None,
        time: NodeTime | None,
        *,
        rollouts: Sequence[Rollout],
        measured: MeasuredNodes,
        records: Sequence[NodeRecord],
    ) -> None:
        self._differentiator, self._timer, self._randomness = differentiator, timer, randomness
        self._square_roots, self._time = square_roots, time
        self._rollouts, self._measured = rollouts, measured
        self._records = list(records)
        self._preconditioned: list[Floats] = []
        self._computed: set[int] = set()
        self.projections: int | None = None
        self.failures: dict[int, Exception] = {}

    def where_outcomes_differ(self, records: Sequence[NodeRecord]) -> list[NodeRecord]:
        """Complete records by the gradients of the nodes where outcomes differ so far.

        Args:
            records: Those of all nodes, with the outcomes so far.
        """
        scored = [index for index, record in enumerate(records) if is_scored(record)]
        differ = outcomes_differ([records[index] for index in scored])
        self._compute([index for index, differs in zip(scored, differ, strict=True) if differs])
        return self._with_gradients(records, np.ones(len(records)), self._computed)

    def compute(self, records: Sequence[NodeRecord]) -> tuple[list[NodeRecord], list[Floats]]:
        """Compute the gradients that the figures need.

        Args:
            records: Those of all nodes, with all outcomes.

        Returns:
            The records with gradients, and the Gram matrices under the preconditioner; empty without one.
        """
        config = self._differentiator.config
        scored = [index for index, record in enumerate(records) if is_scored(record)]
        probabilities = np.ones(len(records))
        probabilities[scored] = gradient_probabilities(
            [records[index] for index in scored],
            # Between waves the gradients of all nodes where outcomes differ were computed.
            1.0 if config.half_width is not None else config.differing_gradients,
            config.agreeing_gradients,
        )
        drawn = draw_gradient_nodes(probabilities[scored], self._randomness.generator("gradients"))
        chosen = [scored[place] for place in drawn]
        if self._time is None:
            self._compute(chosen)
            self._warn_of_failures()
            return self._with_gradients(records, probabilities, set(chosen)), self._preconditioned
        missing = set(chosen)
        for part in self._time.gradient_parts(self._rollouts, self._measured, chosen):
            self._compute(part)
            missing -= set(part)
        self._warn_of_failures()
        # A question whose gradients there was no time for is left out whole, also its nodes that need none.
        questions = question_indices(self._rollouts)
        left_out = {questions[self._measured.nodes[index].rollout] for index in missing}
        completed = [
            without_outcomes(record) if questions[record.rollout] in left_out else record
            for record in self._with_gradients(records, probabilities, set(chosen))
        ]
        return completed, self._preconditioned

    def _compute(self, chosen: Sequence[int]) -> None:
        """Compute the gradients of chosen nodes that have none yet."""
        if not self._computed:
            self.projections = self._projections(chosen)
        wanted = set(chosen) - self._computed
        records, preconditioned = self._differentiator.add_gradients(
            self._measured,
            self._records,
            wanted,
            self._timer,
            projection=RandomProjection(self.projections, self._randomness) if self.projections else None,
            square_roots=self._square_roots,
            failures=self.failures,
        )
        for index in wanted if self._preconditioned else ():
            self._preconditioned[index] = preconditioned[index]
        self._records, self._preconditioned = records, self._preconditioned or preconditioned
        self._computed |= wanted

    def _warn_of_failures(self) -> None:
        """Say that gradients failed; what their nodes have cost is in the report nevertheless."""
        if self.failures:
            error = next(iter(self.failures.values()))
            warnings.warn(
                f"the gradients of {len(self.failures)} nodes could not be computed, so the figures of single tokens "
                "that need them are NaN; the outcomes of their continuations are in the report "
                f"({short_reason(error)}).",
                category=GradientWarning,
                stacklevel=2,
            )

    def _with_gradients(
        self, records: Sequence[NodeRecord], probabilities: Floats, chosen: Collection[int]
    ) -> list[NodeRecord]:
        """Complete the records of chosen nodes; the others get none, even if theirs were computed between waves."""
        return [
            replace(
                record,
                gram=own.gram if index in chosen else np.full_like(own.gram, np.nan),
                gradient_inclusion=np.nan if index in self.failures else float(probabilities[index]),
            )
            for index, (record, own) in enumerate(zip(records, self._records, strict=True))
        ]

    def _projections(self, chosen: Sequence[int]) -> int | None:
        """Number of random directions to project the gradients of chosen nodes on, where that is cheaper."""
        measured, config = self._measured, self._differentiator.config
        if config.selector is not every_node or not chosen:
            return None
        positions: dict[int, list[int]] = {}
        direction_counts: dict[int, list[int]] = {}
        for index in chosen:
            node, branches = measured.nodes[index], measured.branches[index]
            positions.setdefault(node.rollout, []).extend(self._rollouts[node.rollout].positions([node.depth]))
            direction_counts.setdefault(node.rollout, []).append(len(branches) - 1 + len(self._differentiator.teachers))
        lengths = [max(rollout_positions) + 1 for rollout_positions in positions.values()]
        is_cheaper = projection_is_cheaper(
            config.projections, lengths, list(positions.values()), list(direction_counts.values())
        )
        return config.projections if is_cheaper and supports_projection(self._differentiator.student) else None
