import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.engine.tree.branches import choose_branches, proposed_tokens

P = torch.tensor([0.05, 0.4, 0.02, 0.25, 0.08, 0.2], dtype=torch.float64)


def choose(p=P, taken=2, mass=0.6, most=4, tail_draws=2, seed=0, certain=(), roulette=None):
    generator = torch.Generator().manual_seed(seed)
    return choose_branches(
        p,
        [taken, *certain],
        mass=mass,
        max_branches=most,
        tail_draws=tail_draws,
        generator=generator,
        tail_roulette=roulette,
    )


@given(
    st.lists(st.floats(1e-6, 1), min_size=1, max_size=12),
    st.integers(0, 11),
    st.floats(0.01, 1),
    st.integers(1, 20),
    st.integers(1, 5),
)
def test_invariants(values, taken, mass, most, tail_draws):
    p = torch.tensor(values, dtype=torch.float64)
    p, taken = p / p.sum(), taken % len(values)
    branches = choose(p, taken, mass, most, tail_draws)
    tokens = [b.token for b in branches]
    assert len(set(tokens)) == len(tokens)
    assert sum(b.weight for b in branches) == pytest.approx(1, abs=1e-12)
    assert [b.token for b in branches if not b.tail].count(taken) == 1
    assert p[tokens[0]] == p.max()
    assert all(b.probability == pytest.approx(float(p[b.token]), rel=1e-12) for b in branches)
    assert all(b.weight == b.probability for b in branches if not b.tail)
    assert sum(not b.tail for b in branches) <= most + 1
    assert sum(b.tail for b in branches) <= tail_draws


@pytest.mark.parametrize(
    ("mass", "most", "expected"),
    [(0.3, 4, [1]), (0.4, 4, [1]), (0.41, 4, [1, 3]), (0.65, 4, [1, 3]), (0.9, 4, [1, 3, 5, 4]), (0.9, 2, [1, 3])],
)
def test_likely_tokens_up_to_the_mass_or_the_count(mass, most, expected):
    assert [b.token for b in choose(mass=mass, most=most) if not b.tail] == [*expected, 2]


def test_every_token_can_be_a_branch():
    branches = choose(mass=1.0, most=6)
    assert sorted(b.token for b in branches) == list(range(6))
    assert not any(b.tail for b in branches)


@pytest.mark.parametrize(
    "options",
    [{"tail_draws": 1}, {"tail_draws": 3}, {"roulette": 0.9}, {"roulette": 0.6, "tail_draws": 1}, {"certain": [5]}],
)
def test_the_weighted_sum_is_unbiased(options):
    """Also where teachers' tokens are branches, and where the tail is drawn from with a probability below 1."""
    f = torch.tensor([0.3, -1.0, 4.0, 2.0, -3.0, 0.7], dtype=torch.float64)
    sums = torch.tensor([sum(b.weight * f[b.token] for b in choose(seed=seed, **options)) for seed in range(4000)])
    error = sums.std() / len(sums) ** 0.5
    assert error > 1e-3
    assert abs(sums.mean() - P @ f) < 3.5 * error


def test_impossible_tokens_are_no_branches():
    p = torch.tensor([0.0, 0.7, 0.0, 0.3])
    assert [b.token for b in choose(p, taken=1, mass=1.0, most=4)] == [1, 3]


def test_single_precision_that_does_not_quite_add_up():
    p = torch.softmax(torch.linspace(-8, 3, 5000), dim=-1) * 1.0001
    assert sum(b.weight for b in choose(p, taken=0)) == pytest.approx(1, abs=1e-12)


def test_every_token_that_was_taken_is_a_branch():
    branches = choose_branches(P, [2, 0, 1, 2], mass=0.4, max_branches=1, tail_draws=1, generator=torch.Generator())
    assert [b.token for b in branches if not b.tail] == [1, 2, 0]


def test_roulette_draws_from_a_tail_in_proportion_to_its_mass():
    tails = [
        [b.weight for b in choose(mass=0.93, seed=seed, tail_draws=1, roulette=0.2) if b.tail] for seed in range(2000)
    ]
    mass = float(P[0])  # the one token that is neither likely nor taken
    drawn = [weights for weights in tails if weights]
    assert len(drawn) / len(tails) == pytest.approx(mass / 0.2, abs=0.03)
    assert all(weights == pytest.approx([0.2]) for weights in drawn)


def test_a_tail_of_enough_mass_is_drawn_from_as_without_roulette():
    assert all(choose(seed=seed, roulette=0.1) == choose(seed=seed) for seed in range(20))


def test_tokens_that_teachers_propose():
    policies = [torch.tensor([0.5, 0.3, 0.015, 0.185]), torch.tensor([0.03, 0.01, 0.96])]
    assert proposed_tokens(policies, 0.02, 4) == [2, 0, 1, 3]
    assert proposed_tokens(policies, 0.02, 2) == [2, 0]
    assert proposed_tokens(policies, 0.5, 4) == [2]
    assert proposed_tokens([torch.full((4,), float("nan"))], 0.02, 4) == []
