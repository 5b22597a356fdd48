"""The layout of a response on lines."""

import pytest

from odp_callbacks.visualization.rollout_layout import ELLIPSIS, break_into_lines, most_important_lines

LINES = break_into_lines(tuple(f"w{depth}" for depth in range(200)))


def first_depths(lines: list[list[object]]) -> list[int]:
    return [line[0].depth for line in lines]  # type: ignore[attr-defined]


def test_a_response_that_fits_is_kept_whole() -> None:
    assert most_important_lines(LINES, [0.0] * 200, len(LINES)) == (LINES, 0)


@pytest.mark.parametrize("important", [0, 5, -1])
def test_the_most_important_line_is_kept_with_ellipses_around_it(important: int) -> None:
    importance = [1.0 if token in LINES[important] else 0.0 for line in LINES for token in line]
    kept, hidden = most_important_lines(LINES, importance, 4)
    assert len(kept) <= 4
    assert LINES[important] in kept
    assert hidden + sum(len(line) for line in kept if line != [ELLIPSIS]) == 200
    shown = [line for line in kept if line != [ELLIPSIS]]
    assert first_depths(shown) == sorted(first_depths(shown))
    assert (kept[0] == [ELLIPSIS]) == (LINES[0] not in kept)
    assert (kept[-1] == [ELLIPSIS]) == (LINES[-1] not in kept)
