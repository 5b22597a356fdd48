"""The teachers' own responses on disk: a table of its own, which a report without any lacks."""

from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from odp_callbacks.files import write_atomically
from odp_callbacks.records import TeacherResponse
from odp_callbacks.storage.schema import encodable
from odp_callbacks.storage.validation import checked_rows, read_table

TEACHER_RESPONSES_FILE = "teacher_responses.parquet"
SCHEMA = pa.schema(
    [
        ("teacher", pa.string()),
        ("question", pa.string()),
        ("text", pa.string()),
        ("reward", pa.float64()),
        ("correct", pa.bool_()),
        ("truncated", pa.bool_()),
    ]
)


def write_teacher_responses(responses: tuple[TeacherResponse, ...], folder: Path) -> None:
    """Write the responses of a report, if there are any, into its folder."""
    if not responses:
        return
    rows = [
        {field.name: encodable(getattr(response, field.name)) for field in fields(response)} for response in responses
    ]
    content = BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), content, compression="zstd")
    write_atomically(folder / TEACHER_RESPONSES_FILE, content.getvalue())


def read_teacher_responses(content: bytes | None, name: str) -> tuple[TeacherResponse, ...]:
    """Read what :func:`write_teacher_responses` wrote.

    Args:
        content: The content of the file; None if there is none.
        name: The folder, for an error.

    Raises:
        DamagedRecordsError: If the table lacks a column, or a value.
    """
    if content is None:
        return ()
    file_name = f"{name}/{TEACHER_RESPONSES_FILE}"
    rows: list[dict[str, Any]] = checked_rows(read_table(content, file_name), SCHEMA, file_name)
    return tuple(TeacherResponse(**row) for row in rows)
