"""The success model where the truth is known, and the noise correction that uses it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.analysis.success_model import fit_success_model
from tests.helpers.records import synthetic


def population(node_count, count, draw, seed=0):
    """True successes, drawn by ``draw(generator)``, and the evidence of ``count`` continuations of each branch."""
    generator = np.random.default_rng(seed)
    true_successes = np.stack([draw(generator) for _ in range(node_count)])
    nodes = [
        synthetic(wins / count, count=count, total_square=wins.astype(float), seed=index, question=str(index)).record
        for index, wins in enumerate(generator.binomial(count, true_successes))
    ]
    return true_successes, gather(nodes)


@pytest.mark.parametrize("count", [2, 6])
def test_the_posterior_knows_where_the_truth_lies(count):
    """Ranks of the true successes among the draws are uniform when the model's own family made them."""
    true_successes, evidence = population(
        1500,
        count,
        lambda generator: generator.beta(2, 2, size=1) * np.ones(4) * 0 + generator.beta(1.6, 2.4, 4),
    )
    successes = fit_success_model(evidence).draw(evidence, 99)
    ranks = (successes < true_successes[:, None]).mean(axis=1).ravel()
    assert stats.kstest(ranks, "uniform").statistic < {2: 0.05, 6: 0.03}[count]


def test_branches_that_never_differ_are_recognised():
    """However much the few continuations differ by chance."""
    _, evidence = population(1500, 4, lambda generator: np.full(4, generator.random()))
    successes = fit_success_model(evidence).draw(evidence)
    assert evidence.success.std(axis=1).mean() > 0.15
    assert successes.std(axis=2).mean() < 0.04


def test_known_successes_are_what_they_are_and_draws_repeat():
    node = synthetic([0.25, 1.0, 0.5], exact=[True, True, False], count=[1, 1, 4]).record
    evidence = gather([node])
    model = fit_success_model(evidence)
    successes = model.draw(evidence, 32)
    assert (successes[0, :, :2] == [0.25, 1.0]).all()
    assert successes[0, :, 2].std() > 0
    np.testing.assert_array_equal(successes, model.draw(evidence, 32))
    assert model.mean(evidence)[0, :2] == pytest.approx([0.25, 1.0])


def test_rewards_that_hardly_vary_tell_more():
    """Rewards between 0.4 and 0.6: four of them are worth more than four times yes or no."""
    generator = np.random.default_rng(0)
    nodes = []
    for index in range(60):
        means = generator.uniform(0.3, 0.7, size=3)
        rewards = means[:, None] + generator.uniform(-0.05, 0.05, size=(3, 4))
        sums = {"total": rewards.sum(1), "total_square": (rewards**2).sum(1)}
        nodes.append(synthetic(rewards.mean(1), seed=index, **sums).record)
    evidence = gather(nodes)
    successes = fit_success_model(evidence).draw(evidence)
    assert abs(successes - evidence.success[:, None]).mean() < 0.05


@pytest.mark.parametrize("spread", [0.35, 0.2])
def test_reliability_is_the_cosine_of_estimated_and_true(spread):
    """Its mean, against the truth of 2,000 nodes with 6 continuations a branch."""

    def draw(generator):
        return (generator.uniform(0.2, 0.8) + spread * generator.normal(size=4)).clip(0, 1)

    true_successes, evidence = population(2000, 6, draw)
    correction = correct_for_noise(evidence)
    true_offset = true_successes - true_successes[:, :1]
    offset = evidence.success - evidence.success[:, :1]
    inner_product = np.einsum("na,nab,nb->n", offset, evidence.norm_form, true_offset)
    true_norm = np.sqrt(np.einsum("na,nab,nb->n", true_offset, evidence.norm_form, true_offset))
    norm_product = true_norm * evidence.ideal_norm
    cosine = np.divide(inner_product, norm_product, out=np.zeros_like(inner_product), where=norm_product > 0)
    assert correction.reliability.mean() == pytest.approx(cosine.mean(), abs=0.02)
    assert correction.norm.mean() == pytest.approx(true_norm.mean(), rel=0.04)
    assert evidence.ideal_norm.mean() > 1.05 * true_norm.mean(), "noise makes the estimated gradient longer"


def test_the_squared_norm_is_unbiased():
    generator = np.random.default_rng(0)
    evidence = gather([synthetic([0.5] * 4).record])
    true_success = np.array([0.2, 0.7, 0.4, 0.9])
    wins = generator.binomial(3, true_success, size=(20000, 4)).astype(float)
    copies = evidence.take(np.zeros(20000, dtype=np.int64))
    measured = replace(copies, count=np.full((20000, 4), 3.0), total=wins, total_square=wins)
    norm_square = measured.norm_square
    true_offset = true_success - true_success[0]
    true_square = true_offset @ evidence.norm_form[0] @ true_offset
    assert abs(norm_square.mean() - true_square) < 3.5 * norm_square.std() / np.sqrt(len(norm_square))
    assert (norm_square < 0).any(), "estimates may be negative, which keeps their mean unbiased"
    assert (measured.ideal_norm**2).mean() > 1.2 * true_square
