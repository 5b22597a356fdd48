r"""Rules that find the answer in a text: after "Answer:", in ``\boxed{}``, the last number, yes or no, a letter.

Each rule takes a text, such as a response or the solution of a dataset, and returns the answer, or None if the text has
none. If the text has a thinking part that ends with ``</think>``, only what follows it counts.
"""

import re
from collections.abc import Callable
from decimal import Decimal

AnswerRule = Callable[[str], str | None]
"""From a text to the answer that it gives, or None."""
END_OF_THINKING = "</think>"
"""Ends the thinking part of a response."""
ANSWER_MARK = re.compile(r"\banswer(?:\s+is)?\b[\s*_]*:[\s*_]*", re.IGNORECASE)
"""What stands in front of an answer, with the asterisks of bold text."""
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212])?\$?"  # a sign, unless it is the minus of a difference
    r"(?<![^\W\d])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<!\d)\.(?=\d))(?:(?<!\.)\.\d+|(?<=\.)\d+)?"
    r"(?:[eE][-+]?\d{1,2}(?!\d))?"
)
"""A number as English writes it: 7, -1,234.50, $.5, 2e6."""
BOX = r"\boxed{"
YES = frozenset({"yes", "true"})
NO = frozenset({"no", "false"})
LETTER = re.compile(r"[\s*_`\"']*[(\[]?([A-Za-z])(?![\w'])")
"""A single letter at the beginning of a text, perhaps in brackets or in bold."""
MARKUP = "*_`$ \t\n.,;:!?\"'()[]"
"""What may surround an answer without being a part of it."""


def stated_answer(text: str) -> str | None:
    """What follows the last "Answer:", up to the end of its line; a full stop at the end is dropped.

    Args:
        text: A response or a solution. "Final answer:" and "**Answer:**" are found, too.

    Examples:
        >>> stated_answer("Answer: 3? No, once more. **Final answer:** the Rhine.")
        'the Rhine'
    """
    marks = list(ANSWER_MARK.finditer(_after_thinking(text)))
    if not marks:
        return None
    line = _after_thinking(text)[marks[-1].end() :].lstrip().partition("\n")[0]
    return line.strip().strip("*_").removesuffix(".").strip() or None


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``, which may hold braces of its own.

    Args:
        text: A response or a solution. A box that is not closed does not count.

    Examples:
        >>> boxed_answer(r"so \boxed{1}, or rather \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    text = _after_thinking(text)
    start = text.rfind(BOX)
    while start >= 0:
        content = _up_to_closing_brace(text[start + len(BOX) :])
        if content is not None:
            return content.strip() or None
        start = text.rfind(BOX, 0, start)
    return None


def last_number(text: str) -> str | None:
    """The last number, in plain digits: without thousands separators, and without zeros after the decimal point.

    Args:
        text: A response or a solution, with numbers as English writes them.

    Examples:
        >>> last_number("48 / 2 = 24 clips, which cost $1,234.50.")
        '1234.5'
        >>> last_number("none")
    """
    numbers = [match.group() for match in NUMBER.finditer(_after_thinking(text))]
    return _plain_number(numbers[-1]) if numbers else None


def yes_or_no(text: str) -> str | None:
    """``"yes"`` or ``"no"``; true and false count as these.

    It is the first word after the last "Answer:". Without such a mark it is the first or the last word of the text; if
    these contradict each other, there is no answer.

    Args:
        text: A response or a solution.

    Examples:
        >>> yes_or_no("No human can. Answer: Yes, it is."), yes_or_no("Yes, it is."), yes_or_no("Yes? No.")
        ('yes', 'yes', None)
    """
    stated = stated_answer(text)
    words = (_after_thinking(text) if stated is None else stated).lower().split()
    candidates = [words[0]] if stated is not None else [*words[:1], *words[-1:]]
    verdicts = {
        "yes" if word in YES else "no" for word in (word.strip(MARKUP) for word in candidates) if word in YES | NO
    }
    return verdicts.pop() if len(verdicts) == 1 else None


def choice_letter(text: str) -> str | None:
    """The letter of a choice, as a capital.

    It is the first single letter after the last "Answer:". Without such a mark it must begin the text: "B", "(B)" or
    "B. Paris".

    Args:
        text: A response or a solution.

    Examples:
        >>> choice_letter("A or B? Answer: (b)"), choice_letter("B. Paris"), choice_letter("A city, B or C")
        ('B', 'B', None)
    """
    stated = stated_answer(text)
    candidate = _after_thinking(text) if stated is None else stated
    match = LETTER.match(candidate)
    if match is None:
        return None
    letter, rest = match.group(1), candidate[match.end() :]
    if not rest.strip(MARKUP) or rest.startswith((")", "]", ".", ":", "*")):
        return letter.upper() if stated is not None or letter.isupper() else None
    # "A city" begins with an article; other letters are no words.
    return letter.upper() if stated is not None and letter not in "AaI" else None


ANSWER_RULES: dict[str, AnswerRule] = {
    "stated": stated_answer,
    "boxed": boxed_answer,
    "number": last_number,
    "yes-no": yes_or_no,
    "letter": choice_letter,
}
"""The rules by the names that templates and the command line know."""


def same_answer(given: str | None, expected: str) -> bool:
    r"""Whether two answers are the same: as numbers, or as texts apart from case, white space and ``$``.

    Args:
        given: An answer; None is never the same.
        expected: The right one.

    Examples:
        >>> same_answer("1,000.0", "1000"), same_answer(r"\\frac{1}{2}", r"$ \\frac{1}{2} $"), same_answer("0.5", "1/2")
        (True, True, False)
    """
    if given is None:
        return False
    numbers = [_as_number(text) for text in (given, expected)]
    return (numbers[0] is not None and numbers[0] == numbers[1]) or _letters(given) == _letters(expected)


def _after_thinking(text: str) -> str:
    return text.rpartition(END_OF_THINKING)[2]


def _up_to_closing_brace(text: str) -> str | None:
    """What precedes the brace that closes one which was opened before the text; None if none does."""
    depth = 1
    for place, character in enumerate(text):
        is_escaped = place > 0 and text[place - 1] == "\\"
        if character in "{}" and not is_escaped:
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[:place]
    return None


def _as_number(text: str) -> str | None:
    """The number that a text consists of, in plain digits; None if it is none."""
    match = NUMBER.fullmatch(text.strip().strip("$").strip())
    return None if match is None else _plain_number(match.group())


def _plain_number(number: str) -> str:
    digits = format(Decimal(number.replace(",", "").replace("$", "").replace("\u2212", "-")), "f")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


def _letters(text: str) -> str:
    """A text in lower case without white space and dollar signs."""
    return "".join(text.split()).replace("$", "").lower()
