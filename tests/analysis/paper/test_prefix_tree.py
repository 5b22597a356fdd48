"""Visits and successes, against counting by their definition."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from odp_callbacks.analysis.paper.prefix_tree import ANCESTORS, OWN_PATH, ROLLOUT, TreeResponse, prefix_tree
from tests.helpers.paper import random_tree


def counted(tree, responses, path, own_path, ancestors):
    """For each node of the path and each token, visits and successes, by going through every response."""
    visits, successes = Counter(), Counter()
    taken = tree.paths[path]
    for index, response in enumerate(responses):
        times = response.count - (own_path == "left out" and index == tree.own[path])
        for depth in range(min(len(taken), len(response.tokens))):
            passes = response.tokens[:depth] == taken[:depth]
            if passes and (ancestors == "counted" or depth >= response.forced_depth) and times:
                visits[depth, response.tokens[depth]] += times
                successes[depth, response.tokens[depth]] += times * response.success
    return visits, successes


@pytest.mark.parametrize("own_path", OWN_PATH)
@pytest.mark.parametrize("ancestors", ANCESTORS)
@pytest.mark.parametrize("seed", range(5))
def test_visits_and_successes_are_those_of_every_response(own_path, ancestors, seed):
    tree, responses = random_tree(seed)
    for path in range(len(tree.paths)):
        visits, successes = counted(tree, responses, path, own_path, ancestors)
        children = tree.children(path, own_path, ancestors)
        pairs = list(zip(children.depth.tolist(), children.token.tolist(), strict=True))
        assert pairs == sorted(visits)
        np.testing.assert_allclose(children.visits, [visits[pair] for pair in pairs])
        np.testing.assert_allclose(children.successes, [successes[pair] for pair in pairs])


def test_the_four_countings_differ():
    tree, _ = random_tree(0)
    totals = {
        (own_path, ancestors): tree.children(0, own_path, ancestors).visits.sum()
        for own_path in OWN_PATH
        for ancestors in ANCESTORS
    }
    assert len(set(totals.values())) == 4
    assert totals["counted", "counted"] == max(totals.values())


def test_a_thinned_tree_is_that_of_the_first_responses():
    tree, responses = random_tree(1)
    kept = []
    for branch in range(ROLLOUT, 12):
        of_branch = [(index, one) for index, one in enumerate(responses) if one.branch == branch]
        left = int(np.ceil(0.5 * sum(one.count for _, one in of_branch)))
        for index, one in of_branch:
            count = 1 if index in tree.own else min(one.count, max(left, 0))
            left -= one.count
            if count:
                kept.append((index, replace(one, count=count)))
    own = [[index for index, _ in kept].index(index) for index in tree.own]
    expected = prefix_tree(own, [one for _, one in kept])
    thinned = tree.thinned(0.5)
    assert len(thinned.success) < len(tree.success)
    for path in range(len(tree.paths)):
        for one, other in zip(
            vars(thinned.children(path, "left out")).values(),
            vars(expected.children(path, "left out")).values(),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


def test_a_response_that_repeats_the_path_is_not_the_paths_own():
    tree = prefix_tree([0], [TreeResponse((1, 2), 1.0), TreeResponse((1, 2), 1.0)])
    assert tree.children(0, own_path="left out").visits.tolist() == [1.0, 1.0]


def test_an_unknown_counting_is_refused():
    tree, _ = random_tree(0)
    with pytest.raises(ValueError, match="`own_path` must be one of"):
        tree.children(0, own_path="ignored")
    with pytest.raises(ValueError, match="`ancestors` must be one of"):
        tree.children(0, ancestors="reweighted")
