"""Ways to damage what is stored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from odp_callbacks.storage import schema
from odp_callbacks.storage.manifest import write_manifest


def flip_bit(path: Path, position: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def rewrite_table(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a table of a record as a program would that knows the manifest, so that only the content is wrong."""
    parquet.write_table(change(parquet.read_table(folder / name)), folder / name)
    write_manifest(folder)


def rewrite_metadata(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Replace the metadata of a record by what a function makes of them."""

    def changed(table: pa.Table) -> pa.Table:
        metadata = change(json.loads(table.schema.metadata[schema.METADATA_KEY]))
        content = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        return table.replace_schema_metadata({schema.METADATA_KEY: content})

    rewrite_table(folder, schema.NODES_FILE, changed)


def set_value(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    """A table in which one value is another."""
    values = table[column].to_pylist()
    values[row] = value
    index = table.column_names.index(column)
    return table.set_column(index, table.field(column), pa.array(values, table.field(column).type))
