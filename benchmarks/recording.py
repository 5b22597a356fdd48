"""Keeping the continuation trees of probes, which their reports leave out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes, ContinuationTree
from odp_callbacks.engine.tree.rounds import SamplingRounds
from odp_callbacks.records import NodeRecord


@contextmanager
def recording_trees() -> Iterator[list[ContinuationTree]]:
    """Collect the tree of every probe that runs inside the context."""
    trees: list[ContinuationTree] = []
    run = SamplingRounds.run

    def run_and_record(rounds: SamplingRounds, records: Sequence[NodeRecord]) -> list[list[BranchOutcomes]]:
        trees.append(rounds.sampler.tree)
        return run(rounds, records)

    with mock.patch.object(SamplingRounds, "run", run_and_record):
        yield trees
