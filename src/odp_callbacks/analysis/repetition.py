"""Repetition in a response: the share of its n-grams that are there more than once."""

from collections.abc import Hashable, Sequence

NGRAM = 4
"""Tokens of an n-gram; 4 is what is mostly reported."""


def ngram_repetition(tokens: Sequence[Hashable], n: int = NGRAM) -> float:
    """Share of a response's n-grams that repeat an earlier one.

    ``1 - distinct n-grams / n-grams``, "seq-rep-n" of Welleck et al., "Neural text generation with unlikelihood
    training" (arXiv:1908.04319).

    Args:
        tokens: ``T`` tokens, as ids or texts.
        n: Tokens of an n-gram.

    Returns:
        In [0, 1): 0 where all n-grams differ. NaN for fewer than ``n`` tokens, which have no n-gram.

    Raises:
        ValueError: If ``n`` is not positive.

    Examples:
        >>> ngram_repetition("abcabcabc", n=3)  # abc bca cab abc bca cab abc
        0.5714285714285714
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"`n` must be a positive integer, but {n!r} was given.")
    count = len(tokens) - n + 1
    if count < 1:
        return float("nan")
    return 1 - len({tuple(tokens[first : first + n]) for first in range(count)}) / count
