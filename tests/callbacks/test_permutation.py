"""Permutations that are computed element by element."""

from itertools import permutations

import numpy as np
import pytest

from odp_callbacks.callbacks.permutation import permuted_index


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 255, 256, 257, 1000])
def test_every_element_comes_once(size: int) -> None:
    for number in range(3):
        assert sorted(permuted_index(position, size, 5, number) for position in range(size)) == list(range(size))


def test_seeds_and_numbers_give_other_permutations() -> None:
    drawn = {
        tuple(permuted_index(position, 20, seed, number) for position in range(20))
        for seed in range(10)
        for number in range(10)
    }
    assert len(drawn) == 100


def test_all_permutations_of_four_are_equally_likely() -> None:
    """A chi-squared test of 4,800 draws with 23 degrees of freedom, whose 99.99 % quantile is 58.6."""
    counts = dict.fromkeys(permutations(range(4)), 0)
    for number in range(4800):
        counts[tuple(permuted_index(position, 4, 3, number) for position in range(4))] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 58.6


def test_neighbours_are_far_apart_in_a_large_permutation() -> None:
    size = 10**7
    drawn = np.array([permuted_index(position, size, 0) for position in range(2000)])
    assert len(set(drawn.tolist())) == 2000
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.1
    assert abs(drawn.mean() / size - 0.5) < 0.03
