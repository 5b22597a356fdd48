"""Gradients at a sample of the nodes: sums over nodes stay what they are with all gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from odp_callbacks.analysis.alignment_intervals import alignment_intervals
from odp_callbacks.analysis.evidence import Evidence, gather
from odp_callbacks.analysis.node_estimates import NOT_COMPUTED, statuses
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.engine.gradients.gradient_nodes import (
    FEWEST_NODES,
    draw_gradient_nodes,
    gradient_probabilities,
    outcomes_differ,
)
from odp_callbacks.records import NodeRecord
from tests.helpers.records import synthetic


@pytest.fixture(scope="module")
def records() -> list[NodeRecord]:
    """Nodes of 12 questions with two continuations a branch; at three of four of them all outcomes agree."""
    generator = np.random.default_rng(0)
    nodes = []
    for index in range(48):
        agree = index % 4 > 0
        success = [float(index % 3 == 0)] * 3 if agree else [0.5, 1.0, generator.integers(0, 3) / 2]
        record = synthetic(success, count=2, seed=index, question=str(index // 4), depth=2 * (index % 4)).record
        size = np.exp(generator.normal())
        nodes.append(replace(record, inclusion=1 / (1 + index % 5), gram=size * record.gram))
    return nodes


def drawn(records: list[NodeRecord], seed: int, differing: float, agreeing: float) -> list[NodeRecord]:
    """The records as they are with gradients at a sample only."""
    probabilities = gradient_probabilities(records, differing, agreeing)
    chosen = draw_gradient_nodes(probabilities, torch.Generator().manual_seed(seed))
    return [
        replace(
            record,
            gram=record.gram if index in chosen else np.full_like(record.gram, np.nan),
            gradient_inclusion=float(probabilities[index]),
        )
        for index, record in enumerate(records)
    ]


def test_gradients_are_computed_where_they_matter_and_at_a_share_of_the_other_nodes(records: list[NodeRecord]) -> None:
    differ = outcomes_differ(records)
    assert differ.tolist() == [index % 4 == 0 for index in range(48)]
    probabilities = gradient_probabilities(records, 1.0, 0.2)
    assert (probabilities[differ] == 1).all()
    assert probabilities[~differ].sum() == pytest.approx(8)
    assert (probabilities > 0).all()
    assert gradient_probabilities(records, 1.0, 0.01)[~differ].sum() == pytest.approx(FEWEST_NODES)
    assert (gradient_probabilities(records, 1.0, 1.0) == 1).all()
    few = gradient_probabilities(records, 0.3, 1.0)  # of 12, of which none is decided
    assert (few[~differ] == 1).all()
    assert few[differ].sum() == pytest.approx(4)


def test_decided_tokens_always_have_gradients(records: list[NodeRecord]) -> None:
    many = [replace(record, count=40 * record.count, total=40 * record.total) for record in records]
    many = [replace(record, total_square=record.total) for record in many]
    low, high = alignment_intervals(gather(many, logits=True))
    decided = ((low > 0) | (high < 0)).any(axis=1) & outcomes_differ(many)
    assert decided.sum() > 5
    assert (gradient_probabilities(many, 0.1, 0.1)[decided] == 1).all()


def test_a_neighbour_makes_outcomes_differ() -> None:
    """The next node knows that the token which was taken succeeds less than the node's own outcomes let expect."""
    first = synthetic([1.0, 1.0], count=2, taken=1, depth=0).record
    following = synthetic([0.0, 0.5], count=2, seed=1, depth=1).record
    assert outcomes_differ([first, following]).tolist() == [True, True]
    assert outcomes_differ([first]).tolist() == [False]


@pytest.mark.parametrize(("differing", "agreeing"), [(1.0, 0.1), (1.0, 0.3), (0.5, 0.2)])
def test_sums_over_nodes_are_unbiased(records: list[NodeRecord], differing: float, agreeing: float) -> None:
    """Sums of gains and norms, of expected norms of true ideal gradients, and those of the regression of cosines."""
    whole = gather(records)
    model = fit_success_model(whole)
    weight = whole.token_weight

    def sums(evidence: Evidence) -> list[float]:
        correction = correct_for_noise(evidence, model)
        sampled = weight * evidence.gradient_weight
        cosines = sampled @ (correction.reliability * np.nan_to_num(evidence.cosine[:, 0]))
        gains = weight @ evidence.weighted_gain[:, 0], weight @ evidence.weighted_norm
        return [*gains, weight @ correction.norm, cosines, sampled @ correction.reliability**2]

    expected = np.array(sums(whole))
    estimates = np.array([sums(gather(drawn(records, seed, differing, agreeing))) for seed in range(100)])
    error = estimates.std(axis=0, ddof=1) / 10
    assert (np.abs(estimates.mean(axis=0) - expected) <= 3.5 * error + 1e-9).all()
    assert error[1] < 0.05 * expected[1]
    assert error[2] < 0.05 * expected[2]
    if differing == 1:
        np.testing.assert_allclose(estimates[:, [0, 1, 3, 4]], np.tile(expected[[0, 1, 3, 4]], (100, 1)))


def test_without_gradients_nothing_is_claimed_that_needs_them(records: list[NodeRecord]) -> None:
    nodes = drawn(records, 0, 1.0, 0.1)
    evidence = gather(nodes)
    without = np.array([not node.has_gradients for node in nodes])
    assert (evidence.gain[without] == 0).all()
    assert (evidence.ideal_norm[without] == 0).all()
    assert np.isnan(evidence.cosine[without]).all()
    assert np.isnan(evidence.norm_square[without]).all()
    unknown = gather([replace(nodes[0], gram=np.full_like(nodes[0].gram, np.nan), gradient_inclusion=0.5)])
    assert unknown.differs.all()
    assert np.isnan(unknown.gain).all()
    assert np.isnan(unknown.ideal_norm).all()
    assert np.isnan(unknown.cosine).all()
    assert (statuses(unknown) == NOT_COMPUTED).all()
    assert (unknown.weighted_gain == 0).all(), "other nodes stand for it"
