import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odp_callbacks.analysis.nested_design import (
    CANDIDATES,
    NestedDesign,
    UnitPrices,
    best_design,
)
from odp_callbacks.analysis.variance_components import VarianceComponents

positive = st.floats(0.01, 100)


@given(st.tuples(positive, positive, positive, positive), st.tuples(positive, positive, positive, positive), positive)
def test_no_design_that_fits_is_better(prices, components, scale):
    prices, components = UnitPrices(*prices), VarianceComponents(*components)
    budget = 20 * scale * sum((prices.question, prices.rollout, prices.node, prices.continuation))
    best = best_design(prices, components, budget, 1000, {"questions": 10})
    others = [
        NestedDesign(10, rollouts, nodes, continuations)
        for rollouts in (1, 2, 3, 5, 9, 16)
        for nodes in (1, 2, 4, 7, 20, 64)
        for continuations in (1, 2, 3, 8, 32)
    ]
    affordable = [other for other in others if other.price(prices) <= budget]
    if affordable:
        assert best.price(prices) <= budget * (1 + 1e-6)
        assert best.variance(components) <= min(other.variance(components) for other in affordable) * (1 + 1e-6)
    else:
        assert best.price(prices) <= min(other.price(prices) for other in others)


def test_continuous_optimum_of_cochran():
    # m = sqrt(s_c^2 / s_n^2 * c_n / c_c), and so on from level to level (Cochran 1977, equation 10.25).
    prices = UnitPrices(question=640.0, rollout=160.0, node=40.0, continuation=10.0)
    components = VarianceComponents(question=1.0, rollout=4.0, node=64.0, continuation=1024.0)
    best = best_design(prices, components, 1e9, 10**6)
    assert (best.continuations, best.nodes, best.rollouts) == (8, 8, 4)


def test_what_the_user_set_is_kept_and_bounds_bind():
    prices, components = UnitPrices(0.0, 4.0, 1.0, 1.0), VarianceComponents(1.0, 4.0, 16.0, 4.0)
    assert best_design(prices, components, 300, 30, {"continuations": 3}).continuations == 3
    assert best_design(prices, components, 300, 30, {"questions": 4}).questions == 4
    assert best_design(prices, components, 300, 5).questions == 5
    assert best_design(prices, components, 300, 30, at_least={"rollouts": 2}).rollouts == 2
    assert best_design(prices, components, 1e9, 5).nodes == CANDIDATES["nodes"]


def test_nothing_fits():
    prices, components = UnitPrices(0.0, 4.0, 1.0, 1.0), VarianceComponents(1.0, 4.0, 16.0, 4.0)
    assert best_design(prices, components, 3.0, 30) == NestedDesign(1, 1, 1, 1)
    assert best_design(prices, components, 3.0, 30, {"questions": 4, "rollouts": 2}) == NestedDesign(4, 2, 1, 1)
    assert best_design(prices, components, 7.0, 30) == NestedDesign(1, 1, 1, 2)


@pytest.mark.parametrize("argument", ["fixed", "at_least"])
@pytest.mark.parametrize("numbers", [{"rollout": 2}, {"rollouts": 0}, {"nodes": 1.5}])
def test_bad_numbers_are_refused(argument, numbers):
    with pytest.raises(ValueError, match=f"`{argument}` must hold positive integers by the names"):
        best_design(
            UnitPrices(1.0, 1.0, 1.0, 1.0), VarianceComponents(1.0, 1.0, 1.0, 1.0), 1.0, 1, **{argument: numbers}
        )


def test_bad_prices_are_refused():
    with pytest.raises(ValueError, match="`node` must be a price of at least 0, but -1"):
        UnitPrices(1.0, 1.0, -1.0, 1.0)
    with pytest.raises(ValueError, match="one of the prices must be positive"):
        UnitPrices(0.0, 0.0, 0.0, 0.0)


def test_the_variance_of_a_design_is_that_of_its_mean():
    components = VarianceComponents(question=2.0, rollout=1.0, node=3.0, continuation=4.0)
    design = NestedDesign(5, 3, 4, 2)
    generator = np.random.default_rng(0)
    shape = (20000, 5, 3, 4)
    values = (
        generator.normal(scale=2**0.5, size=(*shape[:2], 1, 1))
        + generator.normal(size=(*shape[:3], 1))
        + generator.normal(scale=3**0.5, size=shape)
        + generator.normal(scale=2**0.5, size=shape)  # the mean of two continuations
    )
    simulated = values.mean(axis=(1, 2, 3)).var()
    assert simulated == pytest.approx(design.variance(components), rel=4 * (2 / 20000) ** 0.5)
