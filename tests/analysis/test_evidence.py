"""Records as arrays, and the pooling of consecutive nodes."""

import numpy as np
import pytest

from odp_callbacks.analysis.evidence import MAXIMUM_POOLED_CONTINUATIONS, gather, pool_neighbours, stack
from tests.helpers.records import synthetic


def test_stacking_keeps_the_continuations_as_recorded() -> None:
    nodes = [synthetic((0.25, 0.5), depth=0).record, synthetic((0.5, 1.0, 0.0), count=(2, 4, 6), depth=1).record]
    evidence = stack(nodes)
    np.testing.assert_array_equal(evidence.count, [[4, 4, 1], [2, 4, 6]])
    np.testing.assert_array_equal(evidence.real, [[True, True, False], [True, True, True]])
    np.testing.assert_allclose(evidence.success, [[0.25, 0.5, 0], [0.5, 1, 0]])


def test_pooling_adds_the_next_node_to_the_branch_that_leads_to_it() -> None:
    first = synthetic((0.25, 0.5), weight=(0.6, 0.4), depth=3, taken=1).record
    second = synthetic((0.5, 1.0), weight=(0.5, 0.5), count=(2, 4), depth=4).record
    evidence = stack([first, second])
    pooled = pool_neighbours(evidence, [first, second])
    # Weights 0.5 and 0.5 over 2 and 4 continuations: the mean, 0.75, has the variance of 1 / (1 / 8 + 1 / 16).
    equivalent = 1 / (0.25 / 2 + 0.25 / 4)
    np.testing.assert_allclose(pooled.count, [[4, 4 + equivalent], [2, 4]])
    np.testing.assert_allclose(pooled.total, [[1, 2 + equivalent * 0.75], [1, 4]])
    np.testing.assert_allclose(evidence.count, [[4, 4], [2, 4]])  # the given evidence stays as it is
    np.testing.assert_array_equal(gather([first, second]).success, pooled.success)


@pytest.mark.parametrize("change", [{"depth": 5}, {"rollout": 1}])
def test_only_the_next_token_of_the_same_rollout_is_pooled(change: dict[str, int]) -> None:
    first = synthetic((0.25, 0.5), depth=3, taken=1).record
    second = synthetic((0.5, 1.0), **{"depth": 4, **change}).record
    np.testing.assert_array_equal(gather([first, second]).count, stack([first, second]).count)


def test_a_known_success_stays_known_and_counts_as_many_continuations() -> None:
    known_branch = synthetic((0.25, 1.0), count=(4, 1), depth=3, taken=1, exact=(False, True)).record
    open_branch = synthetic((0.25, 0.5), depth=3, taken=1).record
    known_node = synthetic((1.0, 0.0), count=1, depth=4, exact=True).record
    assert gather([known_branch, known_node]).count[0, 1] == 1
    assert gather([open_branch, known_node]).count[0, 1] == 4 + MAXIMUM_POOLED_CONTINUATIONS
