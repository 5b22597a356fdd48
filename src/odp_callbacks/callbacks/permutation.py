"""Pseudo-random permutations that are computed element by element, so that nothing of their length is stored."""

MASK = 2**64 - 1
ROUNDS = 6
MINIMUM_HALF_BITS = 4
"""A smaller network has few round functions to choose from, and would reach only some of the permutations."""


def permuted_index(position: int, size: int, seed: int, number: int = 0) -> int:
    """Return the element at one position of a pseudo-random permutation of ``range(size)``.

    A balanced Feistel network permutes the smallest range of ``2 ** (2 b)`` numbers that contains ``range(size)``. What
    falls outside ``range(size)`` is permuted again until it falls inside ("cycle walking", Black and Rogaway 2002,
    https://doi.org/10.1007/3-540-45760-7_9).

    Args:
        position: The position, in ``range(size)``.
        size: The length of the permutation.
        seed: Chooses a sequence of permutations.
        number: Which permutation of the sequence.

    Examples:
        >>> sorted(permuted_index(position, 10, seed=1) for position in range(10)) == list(range(10))
        True
    """
    half_bits = max(MINIMUM_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    round_keys = [_mixed(_mixed(_mixed(seed) ^ number) + round_number) for round_number in range(ROUNDS)]
    index = position
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(round_key ^ right) & half_mask)
        index = left << half_bits | right
        if index < size:
            return index


def _mixed(value: int) -> int:
    """Mix the bits of an integer of 64 bits; the finaliser of SplitMix64 (https://doi.org/10.1145/2660193.2660195)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31
