r"""Templates over the columns of a row, as texts with ``{column}``.

They are Python's format strings. Beside Python's own, a field may have one of these formats:

======================== ===================================================================
``{choices:letters}``    a list as lines "A. ...", "B. ..."
``{choices:numbers}``    a list as lines "1. ...", "2. ..."
``{label:letter of choices}``  the letter of the choice with this index, counted from 0
``{label:item of choices}``    the choice with this index itself
``{answer:yes/no}``      the first word for true, the second for false; any two words will do
``{answer:number}``      the answer in a longer text, by a rule of :mod:`~odp_callbacks.engine.answers`
======================== ===================================================================
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from odp_callbacks.engine.answers import ANSWER_RULES
from odp_callbacks.engine.messages import content_text
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rows import is_message_list, is_missing, plain

BRACES = r"braces that belong to the text are doubled, as in \boxed{{}}"
"""What to do about braces that name no column."""
OF_COLUMN = re.compile(r"(letter|item) of (\w+(?:\[\w+\])?)")
TWO_WORDS = re.compile(r"([^\W\d_]+)/([^\W\d_]+)")
LETTERS = string.ascii_uppercase


def fill_template(template: str, row: Row, argument: str = "context") -> str:
    r"""Put the columns of a row into a template.

    Args:
        template: The template.
        row: The row.
        argument: What the template was given as, for an error.

    Raises:
        ValueError: If the template is none, names a column that the row lacks, or a value has no such format.

    Examples:
        >>> row = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
        >>> fill_template("{question}\n{choices:letters}\nAnswer: {answer:letter of choices}", row)
        '2 + 2?\nA. 3\nB. 4\nAnswer: B'
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"`{argument}` {template!r} cannot be read as a template ({error}); {BRACES}.") from None
    filled = []
    for text, field_name, format_spec, conversion in parts:
        filled.append(text)
        if field_name is None:
            continue
        _check_column(field_name, row, argument)
        try:
            filled.append(_field_text(field_name, conversion, format_spec or "", row))
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            field = f"{field_name}:{format_spec}" if format_spec else field_name
            raise ValueError(f"`{argument}` has the field {{{field}}}, which cannot be filled in: {reason}") from error
    return "".join(filled)


def _check_column(field_name: str, row: Row, argument: str) -> None:
    column = field_name.split(".")[0].split("[")[0]
    if column not in row:
        raise ValueError(
            f"`{argument}` names the column {column!r}, but the row has only {sorted(map(str, row))}; {BRACES}."
        )


def _field_text(field_name: str, conversion: str | None, format_spec: str, row: Row) -> str:
    """The text of one field of a template."""
    formatter = string.Formatter()
    value, _ = formatter.get_field(field_name, (), row)
    if conversion is None and not format_spec:
        return _as_text(value)
    if conversion is None and (text := _in_own_format(plain(value), format_spec, row)) is not None:
        return text
    format_spec = formatter.vformat(format_spec, (), row)
    return str(formatter.format_field(formatter.convert_field(value, conversion), format_spec))


def _in_own_format(value: Any, format_spec: str, row: Row) -> str | None:
    """A value in one of the formats of this module; None if the format is Python's."""
    if format_spec == "letters":
        return "\n".join(f"{_letter(place)}. {choice}" for place, choice in enumerate(_choices(value)))
    if format_spec == "numbers":
        return "\n".join(f"{number}. {choice}" for number, choice in enumerate(_choices(value), start=1))
    if match := OF_COLUMN.fullmatch(format_spec):
        kind, column = match.groups()
        _check_column(column, row, f":{format_spec}")
        choices = _choices(plain(string.Formatter().get_field(column, (), row)[0]))
        index = _index(value, len(choices), column)
        return choices[index] if kind == "item" else _letter(index)
    if (match := TWO_WORDS.fullmatch(format_spec)) and not is_missing(value):
        return match.group(1 if _truth(value) else 2)
    if format_spec in ANSWER_RULES:
        answer = ANSWER_RULES[format_spec](_as_text(value))
        if answer is None:
            raise ValueError(f"no answer can be found by the rule {format_spec!r} in {str(value)[:200]!r}.")
        return answer
    return None


def _choices(value: Any) -> list[str]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise ValueError(f"it is {value!r}, and a list of choices is needed.")
    return [_as_text(choice) for choice in value]


def _letter(index: int) -> str:
    if index >= len(LETTERS):
        raise ValueError(f"there are more choices than the {len(LETTERS)} letters; use the format `numbers`.")
    return LETTERS[index]


def _index(value: Any, count: int, column: str) -> int:
    """An index as a number from 0 to ``count - 1``; datasets also write it as a text."""
    is_number = (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.isdecimal()
    )
    if not is_number or not 0 <= int(value) < count:
        raise ValueError(
            f"it is {value!r}, but must be the index of one of the {count} entries of {column!r}, counted from 0."
        )
    return int(value)


def _truth(value: Any) -> bool:
    """Whether a value is true: a bool, 0 or 1, or a text that says so."""
    text = str(value).strip().lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(f"it is {value!r}, which is neither true nor false.")
    return text in ("true", "1", "yes")


def _as_text(value: Any) -> str:
    """A value as it stands in a sentence.

    Raises:
        ValueError: If there is nothing, or something that has no text of its own.
    """
    value = plain(value)
    if is_missing(value):
        raise ValueError(f"it is {value!r} in this row; give every row a value, or leave the row out.")
    if is_message_list(value):
        if len(value) > 1:
            raise ValueError("it holds several messages; name the one that is meant, as in {column[0][content]}.")
        return content_text(value[0].get("content"))
    is_in_parts = isinstance(value, list | tuple) and value and all(isinstance(part, Mapping) for part in value)
    if is_in_parts:
        return content_text(value)
    if isinstance(value, bytes | set | frozenset | Mapping):
        raise ValueError(f"it is {value!r}, which is no text; an entry can be named, as in {{column[key]}}.")
    return f"{value}"
