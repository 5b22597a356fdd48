"""Where continuations go, against the formulae they come from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.analysis.evidence import gather, norm
from odp_callbacks.analysis.success_model import fit_success_model
from odp_callbacks.engine.tree.allocation import TARGETS, allocate, sensitivities
from tests.helpers.records import synthetic


def sample(n=12, seed=0, **fields):
    rng = np.random.default_rng(seed)
    wins = rng.binomial(6, rng.random((n, 4)))
    return gather(
        [
            synthetic(
                wins[i] / 6,
                count=6,
                total_square=wins[i].astype(float),
                weight=rng.dirichlet([4, 2, 1, 1]),
                seed=i,
                inclusion=1 / (1 + i % 3),
                question=str(i % 4),
                **fields,
            ).record
            for i in range(n)
        ]
    )


@given(st.integers(0, 10_000), st.floats(1, 500))
def test_the_allocation_is_neymans(seed, tokens):
    rng = np.random.default_rng(seed)
    score, cost = rng.exponential(size=(5, 3)) * (rng.random((5, 3)) < 0.8), rng.uniform(1, 20, size=(5, 3))
    have = rng.integers(1, 4, size=(5, 3)).astype(float)
    if not score.any():
        assert not allocate(score, cost, have, tokens, rng).any()
        return
    runs = 300
    more = np.mean([allocate(score, cost, have, tokens, rng) for _ in range(runs)], axis=0)
    assert (more[score == 0] == 0).all()
    # In expectation the tokens are spent; and the gain of one more token is the same wherever any were put.
    assert (more * cost).sum() == pytest.approx(tokens, rel=0.1, abs=0.3 * cost.max())
    worth = score**2 / (have + more) ** 2 / cost
    got = more > 0.2
    if got.sum() > 1:
        assert worth[got].max() / worth[got].min() < 1.6
    if got.any():
        assert worth[(more == 0) & (score > 0)].max(initial=0) <= worth[got].max() * 1.3


def test_nothing_to_spend():
    ones = np.ones((2, 2))
    assert not allocate(ones, ones, ones, 0, np.random.default_rng(0)).any()
    assert not allocate(0 * ones, ones, ones, 50, np.random.default_rng(0)).any()


@pytest.mark.parametrize("target", TARGETS)
def test_sensitivities_are_derivatives(target):
    """Central differences of the figure's sum over tokens, at the model's mean success."""
    evidence = sample()
    model = fit_success_model(evidence)
    found = sensitivities(evidence, model, target)
    mean = model.mean(evidence)
    drawn = model.draw(evidence, 16)
    length = norm(evidence.norm_form, drawn - drawn[:, :, :1]).mean(axis=1)
    at_mean = norm(evidence.norm_form, mean)

    def figure(q):
        gain = np.einsum("nka,na->nk", evidence.gain_form, q)
        # The length moves with the success as at its mean, from where the draws put it.
        size = length + (norm(evidence.norm_form, q) - at_mean) * at_mean / length
        w = evidence.token_weight[:, None]
        if target == "predicted_gain":
            return (w * gain).sum(axis=0)
        if target == "alignment":
            return (w * gain / size[:, None]).sum(axis=0)
        return (w * gain).sum(axis=0) / (w * size[:, None]).sum(axis=0) * (w * length[:, None]).sum(axis=0)

    step = 1e-6
    for n in range(4):
        for a in range(4):
            move = np.zeros_like(mean)
            move[n, a] = step
            slope = (figure(mean + move) - figure(mean - move)) / (2 * step)
            assert found[n, :, a] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_spread_of_a_branch_is_not_judged_by_its_own_rewards():
    evidence = sample()
    before = fit_success_model(evidence)
    question, group = evidence.question, np.array([0, 1, 2, 3, 4, 5, 6, 3, 8, 9, 10, 11])
    spread = before.leave_one_out_spread(question, group)
    assert (spread > 0).all()
    assert (spread <= 0.5).all()
    # Another outcome of one branch moves what is expected of the others, not of itself, save through all nodes' fit.
    changed = sample()
    changed.total[3, 1] = changed.total_square[3, 1] = 6 - changed.total[3, 1]
    after = fit_success_model(changed)
    after = type(after)(before.prior, after.log_likelihood, after.wins, after.losses)
    moved = after.leave_one_out_spread(question, group)
    assert moved[3, 1] == pytest.approx(spread[3, 1], abs=1e-12)
    assert abs(moved[3, [0, 2, 3]] - spread[3, [0, 2, 3]]).max() > 1e-4
    # Node 7 has the same prefix as node 3: what it says of that branch is the same rewards. Node 11 is another one.
    assert question[3] == question[7] == question[11]
    assert abs(moved[11] - spread[11]).max() > 1e-4
    with pytest.raises(ValueError, match="`target`"):
        sensitivities(evidence, before, "gain")
