"""The model of success, where its answers are known, and the correction that rests on it."""

import numpy as np
import pytest
from scipy import stats

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.noise_correction import correct_for_noise
from odp_callbacks.analysis.success_model import fit_success_model
from tests.helpers.records import synthetic


def population(n, count, draw, seed=0):
    """Nodes whose branches' successes are drawn by ``draw(rng)``."""
    rng = np.random.default_rng(seed)
    truth = np.stack([draw(rng) for _ in range(n)])
    nodes = [
        synthetic(wins / count, count=count, total_square=wins.astype(float), seed=i, question=str(i)).record
        for i, wins in enumerate(rng.binomial(count, truth))
    ]
    return truth, gather(nodes)


@pytest.mark.parametrize("count", [2, 6])
def test_the_posterior_knows_where_the_truth_lies(count):
    """Ranks of the true successes among the draws are uniform when the model's own family made them."""
    truth, evidence = population(
        1500, count, lambda rng: rng.beta(2, 2, size=1) * np.ones(4) * 0 + rng.beta(1.6, 2.4, 4)
    )
    drawn = fit_success_model(evidence).draw(evidence, 99)
    rank = (drawn < truth[:, None]).mean(axis=1).ravel()
    assert stats.kstest(rank, "uniform").statistic < {2: 0.05, 6: 0.03}[count]


def test_a_common_success_is_found_out():
    """Branches that never differ: the model says so, however much the few continuations do."""
    _, evidence = population(1500, 4, lambda rng: np.full(4, rng.random()))
    drawn = fit_success_model(evidence).draw(evidence)
    assert evidence.success.std(axis=1).mean() > 0.15
    assert drawn.std(axis=2).mean() < 0.04


def test_known_successes_are_what_they_are_and_draws_repeat():
    node = synthetic([0.25, 1.0, 0.5], exact=[True, True, False], count=[1, 1, 4]).record
    evidence = gather([node])
    model = fit_success_model(evidence)
    drawn = model.draw(evidence, 32)
    assert (drawn[0, :, :2] == [0.25, 1.0]).all()
    assert drawn[0, :, 2].std() > 0
    np.testing.assert_array_equal(drawn, model.draw(evidence, 32))
    assert model.mean(evidence)[0, :2] == pytest.approx([0.25, 1.0])


def test_rewards_that_hardly_vary_tell_more():
    """Rewards between 0.4 and 0.6: four of them are worth more than four times yes or no."""
    rng = np.random.default_rng(0)
    nodes = []
    for i in range(60):
        mean = rng.uniform(0.3, 0.7, size=3)
        rewards = mean[:, None] + rng.uniform(-0.05, 0.05, size=(3, 4))
        nodes.append(synthetic(rewards.mean(1), total=rewards.sum(1), total_square=(rewards**2).sum(1), seed=i).record)
    evidence = gather(nodes)
    drawn = fit_success_model(evidence).draw(evidence)
    assert abs(drawn - evidence.success[:, None]).mean() < 0.05


@pytest.mark.parametrize("spread", [0.35, 0.2])
def test_reliability_is_the_cosine_of_estimated_and_true(spread):
    """Its mean, against the truth of 2,000 nodes with 6 continuations a branch."""

    def draw(rng):
        return (rng.uniform(0.2, 0.8) + spread * rng.normal(size=4)).clip(0, 1)

    truth, evidence = population(2000, 6, draw)
    found = correct_for_noise(evidence)
    offset = truth - truth[:, :1]
    inner = np.einsum("na,nab,nb->n", evidence.success - evidence.success[:, :1], evidence.norm_form, offset)
    length = np.sqrt(np.einsum("na,nab,nb->n", offset, evidence.norm_form, offset))
    product = length * evidence.ideal_norm
    cosine = np.divide(inner, product, out=np.zeros_like(inner), where=product > 0)
    assert found.reliability.mean() == pytest.approx(cosine.mean(), abs=0.02)
    assert found.norm.mean() == pytest.approx(length.mean(), rel=0.04)
    assert evidence.ideal_norm.mean() > 1.05 * length.mean(), "noise lengthens"


def test_the_squared_norm_is_unbiased():
    rng = np.random.default_rng(0)
    node = synthetic([0.5] * 4).record
    form = gather([node]).norm_form[0]
    truth = np.array([0.2, 0.7, 0.4, 0.9])
    wins = rng.binomial(3, truth, size=(20000, 4))
    nodes = gather([node]).take(np.zeros(20000, dtype=np.int64))
    measured = type(nodes)(
        **{
            **{name: getattr(nodes, name) for name in nodes.__dataclass_fields__},
            "count": np.full((20000, 4), 3.0),
            "total": wins.astype(float),
            "total_square": wins.astype(float),
        }
    )
    square = measured.norm_square
    exact = (truth - truth[0]) @ form @ (truth - truth[0])
    assert abs(square.mean() - exact) < 3.5 * square.std() / np.sqrt(len(square))
    assert (square < 0).any(), "it may be negative; that is what keeps it unbiased"
    assert (measured.ideal_norm**2).mean() > 1.2 * exact
