"""Safe display of text that users or models wrote: visible, harmless to a terminal or page, and of bounded length."""

import unicodedata
from collections.abc import Sequence

VISIBLE_WHITESPACE = {"\n": "⏎", "\t": "⇥"}
"""Symbols that stand for line breaks and tabs."""
JOINERS = "\u200c\u200d"
"""Invisible characters that are kept, because they join several characters into one emoji or word."""
MAXIMUM_LENGTH = 60
"""Default number of characters to which a token or a name is cut."""


def first_line(error: BaseException) -> str:
    r"""The first line of what an exception says, or its type where it says nothing.

    Examples:
        >>> first_line(ValueError("wrong\nand long")), first_line(ValueError())
        ('wrong', 'ValueError')
    """
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def short_reason(error: BaseException) -> str:
    """The type of an exception and the beginning of what it says, for a warning.

    Examples:
        >>> short_reason(ValueError("wrong"))
        'ValueError: wrong'
    """
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def displayable(text: str, max_length: int = MAXIMUM_LENGTH) -> str:
    r"""Make white space and control characters visible and cut the text to one line.

    Lone surrogates, control characters and marks that reorder text become the replacement character.

    Args:
        text: Any text.
        max_length: Number of characters to keep; an ellipsis marks a cut.

    Examples:
        >>> displayable("a\nb\x1b"), displayable("  "), displayable("abcdef", 3)
        ('a⏎b�', '␣␣', 'abc…')
    """
    text = "".join(_displayable_character(character) for character in text[: max_length + 1])
    if text and not text.strip():
        text = "␣" * len(text)
    return text if len(text) <= max_length else text[:max_length] + "…"


def quoted_names(names: Sequence[str]) -> str:
    """Enumerate names in quotation marks, ready for display.

    Args:
        names: At least one.

    Examples:
        >>> quoted_names(["answer", "base", "solution"])
        '“answer”, “base” and “solution”'
    """
    quoted = [f"“{displayable(name)}”" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def shorten_middle(text: str, max_length: int = 24) -> str:
    """Shorten a name by leaving out its middle, because names often differ at the end.

    Args:
        text: Any text.
        max_length: Number of characters of the result, the ellipsis included.

    Examples:
        >>> shorten_middle("qwen2.5-1.5b-instruct-sft-a", 15)
        'qwen2.5…t-sft-a'
    """
    text = displayable(text, max(len(text), 1))
    end_length = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[: max_length - 1 - end_length]}…{text[-end_length:]}"


def keep_end(text: str, max_length: int) -> str:
    r"""Keep the end of a long text, where a prompt has its question; line breaks are kept.

    Args:
        text: Any text.
        max_length: Number of characters to keep; an ellipsis marks a cut.

    Examples:
        >>> keep_end("first\nlast", 4)
        '… last'
    """
    end = printable(text[-max_length:])
    return end if len(text) <= max_length else "… " + end


def printable(text: str) -> str:
    r"""Replace everything that a terminal would interpret, except spaces and line breaks.

    Examples:
        >>> printable("a\n\x1b[31mb")
        'a\n�[31mb'
    """
    return "".join(character if character == "\n" else _displayable_character(character) for character in text)


def display_width(text: str) -> int:
    r"""Number of columns in a monospaced font: two for a wide East Asian character, none for a combining mark.

    Examples:
        >>> display_width("ab"), display_width("日本"), display_width("a\u0301")
        (2, 4, 1)
    """
    return sum(_character_width(character) for character in text)


def is_visible(text: str) -> bool:
    r"""Whether a text holds only visible characters, spaces and :data:`JOINERS`.

    Examples:
        >>> is_visible("a b"), is_visible("a\u202eb"), is_visible("\ud800")
        (True, False, False)
    """
    return all(
        character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs" for character in text
    )


def _character_width(character: str) -> int:
    if unicodedata.category(character) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _displayable_character(character: str) -> str:
    if character in VISIBLE_WHITESPACE:
        return VISIBLE_WHITESPACE[character]
    if character.isprintable() or character in JOINERS:
        return character
    return "␣" if unicodedata.category(character) == "Zs" else "\N{REPLACEMENT CHARACTER}"
