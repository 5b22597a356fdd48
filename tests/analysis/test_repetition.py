"""Repetition of n-grams."""

import math

import pytest

from odp_callbacks.analysis.repetition import ngram_repetition


def test_repetition_by_hand() -> None:
    assert ngram_repetition(range(10)) == 0
    assert ngram_repetition([7] * 10) == pytest.approx(1 - 1 / 7)
    assert ngram_repetition(["a", "b", "a", "b"], n=2) == pytest.approx(1 / 3)  # ab, ba, ab
    assert ngram_repetition("aab", n=1) == pytest.approx(1 / 3)


def test_what_is_too_short_has_none() -> None:
    assert math.isnan(ngram_repetition("abc"))
    assert ngram_repetition("abcd") == 0


@pytest.mark.parametrize("n", [0, -1, True, 1.5])
def test_a_length_that_is_no_positive_integer_is_refused(n: object) -> None:
    with pytest.raises(ValueError, match="`n` must be a positive integer"):
        ngram_repetition("abcd", n)  # type: ignore[arg-type]
