"""Text that users and models wrote, made fit to be shown: whatever stands in it stays text of a bounded length."""

import unicodedata

SIGNS = {"\n": "⏎", "\t": "⇥"}
JOINERS = "\u200c\u200d"
"""Invisible, but they make one emoji or one word of several signs."""
LONGEST = 60
"""Characters of a token or a name that are shown."""


def shown(text: str, longest: int = LONGEST) -> str:
    r"""A piece of text with its white space and control characters visible, and no longer than a line.

    Lone surrogates, control characters and marks that reorder text become the replacement character.

    Args:
        text: Whatever.
        longest: Characters that are kept; more are cut, which an ellipsis says.

    Examples:
        >>> shown("a\nb\x1b"), shown("  "), shown("abcdef", 3)
        ('a⏎b�', '␣␣', 'abc…')
    """
    text = "".join(_sign(c) for c in text[: longest + 1])
    if text and not text.strip():
        text = "␣" * len(text)
    return text if len(text) <= longest else text[:longest] + "…"


def middle(text: str, longest: int = 24) -> str:
    """A name, its middle left out where it is too long: names often differ at their end.

    Examples:
        >>> middle("qwen2.5-1.5b-instruct-sft-a", 15)
        'qwen2.5…t-sft-a'
    """
    text = shown(text, max(len(text), 1))
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[: longest - 1 - half]}…{text[-half:]}"


def cut(text: str, longest: int) -> str:
    r"""The end of a long text, which is where the question stands; line breaks are kept.

    Examples:
        >>> cut("first\nlast", 4)
        '… last'
    """
    end = printable(text[-longest:])
    return end if len(text) <= longest else "… " + end


def printable(text: str) -> str:
    r"""The same text with its line breaks and spaces, and nothing else that a screen would obey.

    Examples:
        >>> printable("a\n\x1b[31mb")
        'a\n�[31mb'
    """
    return "".join(c if c == "\n" else _sign(c) for c in text)


def wide(text: str) -> int:
    r"""Columns of a monospaced font that a text takes: two for each wide character of East Asia, none for marks.

    Examples:
        >>> wide("ab"), wide("日本"), wide("a\u0301")
        (2, 4, 1)
    """
    marks = {"Mn", "Me", "Cf"}
    return sum(
        0 if unicodedata.category(c) in marks else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def visible(text: str) -> bool:
    r"""Whether a text has only what can be seen, spaces, and what joins letters or emoji.

    Examples:
        >>> visible("a b"), visible("a\u202eb"), visible("\ud800")
        (True, False, False)
    """
    return all(c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs" for c in text)


def _sign(c: str) -> str:
    if c in SIGNS:
        return SIGNS[c]
    if c.isprintable() or c in JOINERS:
        return c
    return "␣" if unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}"
