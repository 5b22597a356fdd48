"""Keeping the continuation trees of probes, which their reports leave out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from odp_callbacks.engine.tree.continuation_tree import BranchOutcomes, ContinuationTree
from odp_callbacks.engine.tree.stream import ContinuationStream
from odp_callbacks.records import NodeRecord


@contextmanager
def recording_trees() -> Iterator[list[ContinuationTree]]:
    """Collect the tree of every probe that runs inside the context."""
    trees: list[ContinuationTree] = []
    run = ContinuationStream.run

    def run_and_record(stream: ContinuationStream, records: Sequence[NodeRecord]) -> list[list[BranchOutcomes]]:
        trees.append(stream.sampler.tree)
        return run(stream, records)

    with mock.patch.object(ContinuationStream, "run", run_and_record):
        yield trees
