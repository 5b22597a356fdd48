"""Probes with nothing to find: few nodes, early ends, and no bias in what is found after all."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.engine.prompts import Question
from odp_callbacks.engine.rollouts import Rollout
from odp_callbacks.engine.tree.branches import Branch
from odp_callbacks.engine.tree.budget import read_allocation_state
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.engine.tree.nodes import Node
from odp_callbacks.engine.tree.quiet_questions import FEWEST_QUESTIONS, quiet_shares, thin_quiet_questions
from odp_callbacks.engine.tree.recording import with_outcomes
from tests.helpers.records import synthetic


def rollouts_with(rewards: Sequence[Sequence[float]]) -> list[Rollout]:
    """Rollouts of four tokens with the given rewards, one list for each question."""
    questions = [Question(str(index), {}, torch.tensor([1])) for index in range(len(rewards))]
    return [
        Rollout(question, (2, 3, 4, 5), "", False, reward=reward)
        for question, of_question in zip(questions, rewards, strict=True)
        for reward in of_question
    ]


def shares_of(rewards: Sequence[Sequence[float]]) -> list[float]:
    return list(quiet_shares(rollouts_with(rewards)).values())


def test_the_decision_about_a_question_looks_at_the_others_only() -> None:
    quiet = [[0.0, 0.0]] * 13 + [[1.0, 1.0]] * 6
    assert shares_of(quiet) == pytest.approx([1 / 19] * 19)
    assert shares_of([[0.0, 1.0], *quiet]) == pytest.approx([1 / 20, *[1.0] * 19])
    assert shares_of([[0.0, 1.0], [0.5, 1.0], *quiet]) == [1.0] * 21
    assert shares_of(quiet[:15]) == [1.0] * 15, "too few to tell"
    assert shares_of([[0.0, 0.0]]) == [1.0], "there is no other question"
    assert shares_of([[0.0], [1.0], [0.5]]) == [1.0] * 3, "one rollout tells nothing about differences"
    assert shares_of([[0.0] * 4] * 7) == pytest.approx([1 / 19] * 7)


def test_thinned_sums_are_unbiased() -> None:
    rollouts = rollouts_with([[0.0, 0.0]] * 20)
    nodes = [Node(index, depth, 0.5) for index in range(40) for depth in range(4)]
    values = {(node.rollout, node.depth): np.sin(node.rollout) + node.depth for node in nodes}
    full = sum(values.values()) / 0.5
    generator = torch.Generator().manual_seed(0)
    sums, counts = [], []
    for _ in range(2000):
        kept = thin_quiet_questions(rollouts, nodes, generator)
        counts.append(len(kept))
        sums.append(sum(values[node.rollout, node.depth] / node.inclusion for node in kept))
    assert np.mean(counts) == pytest.approx(160 / 20, abs=0.1)
    assert min(counts) > 0
    assert abs(np.mean(sums) - full) < 3.5 * np.std(sums) / np.sqrt(len(sums))


def test_nothing_is_thinned_where_rewards_differ_or_nodes_are_few() -> None:
    nodes = [Node(index, 0, 1.0) for index in range(20)]
    generator = torch.Generator().manual_seed(0)
    assert thin_quiet_questions(rollouts_with([[0.0, 1.0], [1.0, 0.0]] * 5), nodes, generator) == nodes
    few = nodes[: 2 * FEWEST_QUESTIONS]  # with two rollouts each
    assert thin_quiet_questions(rollouts_with([[0.0, 0.0]] * 20), few, generator) == few


def test_whole_questions_are_kept() -> None:
    rollouts = rollouts_with([[0.0, 0.0]] * 20)
    nodes = [Node(index, depth, 0.5) for index in range(40) for depth in range(4)]
    kept = thin_quiet_questions(rollouts, nodes, torch.Generator().manual_seed(1))
    assert len(kept) == 8
    assert len({rollouts[node.rollout].question.id for node in kept}) == 1
    assert {node.inclusion for node in kept} == {0.5 / 20}


@pytest.mark.parametrize(
    ("rewards", "differing", "expected"),
    [
        ([[0.0] * 4] * 6, [], [False] * 6),
        ([[0.0] * 4] * 6, [2], [True, True, False, True, True, True]),
        ([[0.0] * 4] * 6, [2, 4], [True] * 6),
        ([[0.0] * 3 + [1.0]] * 2 + [[0.0] * 4] * 4, [], [True] * 6),
    ],
)
def test_continuations_end_where_no_other_question_differs(
    rewards: list[list[float]], differing: list[int], expected: list[bool]
) -> None:
    rollouts = rollouts_with(rewards)
    nodes = [Node(4 * question, 1, 1.0) for question in range(6)]
    tree = ContinuationTree(rollouts, nodes)
    tree.set_branches([[Branch(3, 0.5, 0.5, tail=False), Branch(7, 0.5, 0.5, tail=False)] for _ in nodes])
    records = []
    for question in range(6):
        tree.outcomes[question][0].add(0.0, 0)
        tree.outcomes[question][1].add(float(question in differing), 0)
        record = synthetic([0.0, 0.0], question=str(question), rollout=4 * question, depth=1).record
        records.append(with_outcomes(record, tree.outcomes[question]))
    state = read_allocation_state(tree, gather(records, logits=True), np.ones(6))
    assert state.open.all(axis=1).tolist() == expected
    assert state.open.any(axis=1).tolist() == expected
