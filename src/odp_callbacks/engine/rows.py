"""Questions in whatever form people have them: lists, tables, columns and datasets become rows by index."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, overload

PROMPT_COLUMNS = ("prompt", "input_ids")
"""Columns of which every row needs one."""
WORKING_FORM = "[{'prompt': ..., 'answer': ...}, ...]"
"""What is suggested in place of something that cannot be used."""


def as_rows(given: Any, argument: str = "prompts") -> "Rows":
    """Turn questions into rows that are read one by one, when they are needed.

    Args:
        given: A list or map-style dataset of rows; a list, array or column of prompts; a table of pandas, polars or
            Arrow; or a mapping from column to a list. A row is a mapping, a pandas Series, a named tuple or a
            dataclass.
        argument: What to call it in an error.

    Returns:
        The rows. Mappings are passed on as they are.

    Raises:
        TypeError: If ``given`` has no length or cannot be indexed.
        ValueError: If it holds several splits, a single row, or columns that are no lists of one length.

    Examples:
        >>> list(as_rows(["1 + 1 =", "2 + 2 ="]))
        [{'prompt': '1 + 1 ='}, {'prompt': '2 + 2 ='}]
        >>> as_rows({"prompt": ["1 + 1 =", "2 + 2 ="], "answer": ["2", "4"]})[1]
        {'prompt': '2 + 2 =', 'answer': '4'}
    """
    if isinstance(given, Rows):
        return given
    if is_table(given):
        return Rows(given, argument)
    if isinstance(given, Mapping):
        _check_columns(given, argument)
        return Rows(given, argument)
    if isinstance(given, str | bytes):
        raise TypeError(f"`{argument}` must be rows such as {WORKING_FORM}, but the text {given[:40]!r} was given.")
    if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise TypeError(
            f"`{argument}` must be rows with `len` and indexing, or None, but got {given!r}{_remedy(given)}"
        )
    return Rows(given, argument)


def is_table(given: Any) -> bool:
    """Whether this is a table of pandas, polars or Arrow."""
    package = type(given).__module__.partition(".")[0]
    return (package, type(given).__name__) in {("pandas", "DataFrame"), ("polars", "DataFrame"), ("pyarrow", "Table")}


class Rows(Sequence[Mapping[str, Any]]):
    """Rows that are read one by one from what was given.

    Args:
        source: A sequence of rows or prompts, a table, or a mapping of columns.
        argument: What to call it in an error.
    """

    def __init__(self, source: Any, argument: str = "prompts") -> None:
        self.source, self.argument = source, argument

    def __len__(self) -> int:
        if isinstance(self.source, Mapping):
            return len(next(iter(self.source.values()), ()))
        return len(self.source)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        """Read one row, or a list of rows."""
        row_count = len(self)
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(row_count))]
        if not -row_count <= index < row_count:
            raise IndexError(f"`{self.argument}` has {row_count} rows, and none with the index {index}.")
        return self._read(index % row_count)

    def _read(self, index: int) -> Mapping[str, Any]:
        source = self.source
        if isinstance(source, Mapping):
            return {str(name): plain(_entry(column, index)) for name, column in source.items()}
        package = type(source).__module__.partition(".")[0] if is_table(source) else ""
        if package == "pandas":
            cells = {str(name): source[name].iloc[index] for name in source.columns}
            numbers = {str(name) for name in source.columns if getattr(source[name].dtype, "kind", "") == "f"}
            # A number that is missing is NaN; in any other column NaN stands for "nothing".
            return {name: plain(cell) if name in numbers else present(plain(cell)) for name, cell in cells.items()}
        if package == "polars":
            return {name: plain(cell) for name, cell in source.row(index, named=True).items()}
        if package == "pyarrow":
            row: Mapping[str, Any] = source.slice(index, 1).to_pylist()[0]
            return row
        return as_row(_entry(source, index), index, self.argument)


def as_row(item: Any, index: int, argument: str = "prompts") -> Mapping[str, Any]:
    """Turn one item into a row: a mapping stays what it is, a bare prompt becomes a row that has only this prompt.

    Args:
        item: A row or a prompt.
        index: Its place, for an error.
        argument: What it is a part of, for an error.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(item, Mapping):
        return item
    if isinstance(item, str):
        return {"prompt": str(item)}
    if is_message_list(item):
        return {"prompt": plain(item)}
    if type(item).__module__.partition(".")[0] == "pandas" and hasattr(item, "to_dict"):
        return {str(name): present(plain(cell)) for name, cell in item.to_dict().items()}
    if isinstance(item, tuple) and hasattr(item, "_asdict"):
        return {name: plain(cell) for name, cell in item._asdict().items()}
    if is_dataclass(item) and not isinstance(item, type):
        return {field.name: plain(getattr(item, field.name)) for field in fields(item)}
    if names := getattr(getattr(item, "dtype", None), "names", None):  # a row of a structured array
        return {name: plain(item[name]) for name in names}
    raise ValueError(
        f"`{argument}` has {item!r} in row {index}, which is a {type(item).__name__}; give rows such as {WORKING_FORM}."
    )


def is_message_list(value: Any) -> bool:
    """Whether this is a list or an array of chat messages."""
    if isinstance(value, str | bytes | Mapping) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return False
    return len(value) > 0 and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value
    )


def plain(value: Any) -> Any:
    """A cell without numpy: arrays of objects become lists, and numbers and texts of numpy those of Python.

    Examples:
        >>> import numpy as np
        >>> plain(np.array([{"role": "user", "content": np.str_("1 + 1")}], dtype=object))
        [{'role': 'user', 'content': '1 + 1'}]
    """
    if type(value).__module__ == "numpy":
        return plain(value.tolist()) if hasattr(value, "tolist") else value
    if type(value) in (list, tuple):
        return type(value)(plain(part) for part in value)
    if type(value) is dict:
        return {name: plain(part) for name, part in value.items()}
    return value


def has_numpy(value: Any) -> bool:
    """Whether :func:`plain` would change a value."""
    if type(value) in (list, tuple):
        return any(has_numpy(part) for part in value)
    if type(value) is dict:
        return any(has_numpy(part) for part in value.values())
    return type(value).__module__ == "numpy"


def present(value: Any) -> Any:
    """None for what pandas writes where nothing is (NaN, NA, NaT), and any other value unchanged."""
    return None if is_missing(value) else value


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, or what pandas writes where nothing is."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value


def _entry(column: Any, index: int) -> Any:
    """The entry at a place, also of a pandas Series, whose own indices are labels."""
    return column.iloc[index] if hasattr(column, "iloc") else column[index]


def _check_columns(columns: Mapping[Any, Any], argument: str) -> None:
    """Raise ``ValueError`` unless a mapping is one from column to a list with an entry for each row."""
    if not columns:
        return
    if all(is_table(split) or hasattr(split, "column_names") for split in columns.values()):
        first_split = next(iter(columns))
        raise ValueError(
            f"`{argument}` holds the splits {[str(name) for name in columns]}; give one of them, "
            f"`{argument}[{first_split!r}]`."
        )
    if not any(name in columns for name in PROMPT_COLUMNS):
        raise ValueError(f"`{argument}` needs a column 'prompt', but has {sorted(map(str, columns))}.")
    prompts = columns["prompt"] if "prompt" in columns else columns["input_ids"]
    if isinstance(prompts, str) or is_message_list(prompts):
        raise ValueError(f"`{argument}` is a single row; give a list of rows, `[row]`.")
    lengths: dict[str, int] = {}
    for name, column in columns.items():
        if isinstance(column, str | bytes | Mapping) or not (
            hasattr(column, "__len__") and hasattr(column, "__getitem__")
        ):
            raise ValueError(
                f"`{argument}` is a mapping of columns, but its column {name!r} is {column!r}; give a list with one "
                "entry for each row."
            )
        lengths[str(name)] = len(column)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"`{argument}` has columns of different lengths: {lengths}.")


def _remedy(given: Any) -> str:
    """What would work in place of something that cannot be indexed."""
    if hasattr(given, "take") and hasattr(given, "__iter__"):
        return "; it is streamed, so give some of its rows, such as `list(dataset.take(1000))`."
    if hasattr(given, "collect"):
        return "; give the table, `frame.collect()`."
    return "; give a list of them, `list(...)`." if hasattr(given, "__iter__") else "."
