"""Files of questions with their demonstrations, and the questions that such files add columns to."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from odp_callbacks.engine.prompts import Row
from odp_callbacks.files import local_path, write_atomically

FORMATS = (".jsonl", ".parquet")


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows to a file, which appears whole or not at all.

    Args:
        rows: The rows.
        path: A ``.jsonl`` or ``.parquet`` file.
    """
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in rows]
        write_atomically(path, "".join(lines).encode("utf-8", "replace"))
        return
    import pyarrow as pa
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), content, compression="zstd")
    write_atomically(path, content.getvalue())


def load_rows(file: str) -> list[Row]:
    """Read the rows of a file that ``odp-callbacks demonstrations`` wrote.

    Raises:
        ValueError: If there is no such file, or it cannot be read.
    """
    path = local_path("demonstrations", file)
    if path.suffix not in FORMATS or not path.exists():
        raise ValueError(f"`demonstrations` names {file!r}, which is no {' or '.join(FORMATS)} file.")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        from pyarrow import parquet

        rows: list[Row] = parquet.read_table(path).to_pylist()
    except ValueError as error:  # of JSON; pyarrow's own errors are such, too
        raise ValueError(f"`demonstrations` names {file!r}, which cannot be read: {error}") from error
    return rows


def add_demonstrations(rows: Sequence[Row], tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Add to each row the columns of the rows with the same prompt; rows that a table lacks are left out.

    Args:
        rows: The questions.
        tables: The rows of each file that ``odp-callbacks demonstrations`` wrote.

    Raises:
        ValueError: If no question is left.

    Examples:
        >>> add_demonstrations([{"prompt": "a"}, {"prompt": "b"}], [[{"prompt": "b", "demonstrations": ["c"]}]])
        [{'prompt': 'b', 'demonstrations': ['c']}]
    """
    indices = [{_identity(row): row for row in table} for table in tables]
    joined: list[Row] = []
    for row in rows:
        key = _identity(row)
        if all(key in index for index in indices):
            added = {name: value for index in indices for name, value in index[key].items() if name not in row}
            joined.append({**row, **added})
    if rows and not joined:
        raise ValueError(
            "`demonstrations` has none of the questions of `dataset`; give the file that odp-callbacks demonstrations "
            "wrote for the same `dataset`, `columns`, `shots`, `seed` and `chat`."
        )
    return joined


def _identity(row: Row) -> str:
    """What identifies a question across files: its prompt, a text or messages."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=repr)
