"""The layout of a response on lines of a monospaced font."""

from collections.abc import Sequence
from dataclasses import dataclass

from odp_callbacks.text import display_width, displayable

MAXIMUM_COLUMNS = 42
"""Columns of a line; more would not be legible on a card of TensorBoard."""


@dataclass(frozen=True)
class PlacedToken:
    """A token on its line.

    Attributes:
        column: Column at which it starts.
        depth: Its position in the response; -1 for an ellipsis.
        text: Its text as it is displayed.
    """

    column: int
    depth: int
    text: str

    @property
    def end(self) -> int:
        """The first column after the token and the space that follows it."""
        return self.column + display_width(self.text) + 1


Line = list[PlacedToken]
ELLIPSIS = PlacedToken(0, -1, "…")


def break_into_lines(pieces: tuple[str, ...]) -> list[Line]:
    """Place the tokens of a response on lines, with visible white space.

    Examples:
        >>> [[token.text for token in line] for line in break_into_lines(("a", " b"))]
        [['a', '·b']]
    """
    lines: list[Line] = [[]]
    column = 0
    for depth, piece in enumerate(pieces):
        token = PlacedToken(column, depth, displayable(piece, 40).replace(" ", "·").replace("␣", "·") or "∅")
        if token.end > MAXIMUM_COLUMNS - 1 and lines[-1]:
            token = PlacedToken(0, depth, token.text)
            lines.append([])
        lines[-1].append(token)
        column = token.end
    return lines


def excerpt(lines: list[Line], measured: set[int], maximum_lines: int) -> tuple[list[Line], int]:
    """Keep the lines that have measured tokens, with an ellipsis in place of each gap.

    Args:
        lines: All lines of the response.
        measured: Depths of the measured tokens.
        maximum_lines: Lines to keep at most.

    Returns:
        The kept lines, and the number of measured tokens on lines that did not fit.
    """
    kept_lines: list[Line] = []
    in_gap, hidden = False, 0
    for line in lines:
        measured_on_line = sum(token.depth in measured for token in line)
        if measured_on_line and len(kept_lines) + in_gap < maximum_lines:
            if in_gap:
                kept_lines.append([ELLIPSIS])
            kept_lines.append(line)
            in_gap = False
        else:
            in_gap = True
            hidden += measured_on_line
    if in_gap:
        kept_lines.append([ELLIPSIS])
    return kept_lines, hidden


def most_important_lines(lines: list[Line], importance: Sequence[float], maximum_lines: int) -> tuple[list[Line], int]:
    """Keep the lines that matter most, in their order, with an ellipsis in place of each gap.

    Args:
        lines: All lines of the response.
        importance: Of each token, by its depth.
        maximum_lines: Lines to keep at most, ellipses included.

    Returns:
        The kept lines, and the number of tokens on lines that were left out.
    """
    if len(lines) <= maximum_lines:
        return lines, 0
    totals = [sum(importance[token.depth] for token in line) for line in lines]
    kept: set[int] = set()
    for index in sorted(range(len(lines)), key=lambda index: -totals[index]):
        if len(_with_ellipses(lines, kept | {index})) <= maximum_lines:
            kept.add(index)
    hidden = sum(len(line) for index, line in enumerate(lines) if index not in kept)
    return _with_ellipses(lines, kept), hidden


def _with_ellipses(lines: list[Line], kept: set[int]) -> list[Line]:
    """The kept lines, with an ellipsis in place of each gap."""
    shown: list[Line] = []
    for index, line in enumerate(lines):
        if index in kept:
            shown.append(line)
        elif not shown or shown[-1] != [ELLIPSIS]:
            shown.append([ELLIPSIS])
    return shown
