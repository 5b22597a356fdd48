"""Checks of what stands in the files of a record: they may have been written, or changed, by something else."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from odp_callbacks.records import NodeRecord, ProbeReport
from odp_callbacks.storage.manifest import DamagedRecordsError
from odp_callbacks.storage.schema import LIST_COLUMNS, MATRIX_COLUMNS, PREDICTOR_PREFIX, SCALAR_COLUMNS
from odp_callbacks.text import first_line
from odp_callbacks.update_records import UpdateRecord

NODE_SCHEMA = pa.schema(
    [
        *SCALAR_COLUMNS.items(),
        *((column, pa.list_(value_type)) for column, value_type in {**LIST_COLUMNS, **MATRIX_COLUMNS}.items()),
    ]
)
"""Columns that a table of nodes has whatever predictors there are."""


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_table_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_step(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _is_names(value.get("question"))
        and isinstance(value.get("correct"), list)
        and isinstance(value.get("gram"), list)
        and len(value["correct"]) == len(value["question"])
        and all(map(_is_number, value["gram"]))
    )


def _is_texts_by_token(value: object) -> bool:
    return isinstance(value, dict) and all(
        token.lstrip("-").isdecimal() and isinstance(text, str) for token, text in value.items()
    )


METADATA_ENTRIES: dict[str, Callable[[object], bool]] = {
    "teachers": _is_names,
    "modules": _is_names,
    "generated_tokens": _is_table_of(_is_number),
    "continuations": _is_count,
    "truncated": _is_count,
    "left_out": _is_table_of(_is_count),
    "slot_steps": _is_table_of(_is_count),
    "stage_seconds": _is_table_of(_is_number),
    "settings": lambda value: isinstance(value, dict),
    "step": _is_step,
    "token_text": _is_texts_by_token,
}
"""What each entry of the metadata must be."""


def check_metadata(metadata: Mapping[str, Any], name: str) -> None:
    """Check that no entry of the metadata is missing, and that each is what it must be.

    Args:
        metadata: With the names of the current version.
        name: The folder, for the error.

    Raises:
        DamagedRecordsError: If that is not so.
    """
    for entry, is_valid in METADATA_ENTRIES.items():
        if entry not in metadata:
            raise DamagedRecordsError(f"`folder` is damaged: the metadata in {name} lack `{entry}`.")
        if not is_valid(metadata[entry]):
            raise DamagedRecordsError(
                f"`folder` is damaged: the metadata in {name} have {str(metadata[entry])[:80]!r} as `{entry}`."
            )
    step = metadata["step"]
    if step is not None and len(step["gram"]) != (len(step["question"]) * (2 + len(metadata["teachers"]))) ** 2:
        raise DamagedRecordsError(
            f"`folder` is damaged: `step` in the metadata in {name} does not fit the number of teachers."
        )


def read_table(content: bytes, name: str) -> pa.Table:
    """A Parquet file from its bytes.

    Raises:
        DamagedRecordsError: If it is none, for example because it was cut short.
    """
    try:
        return parquet.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedRecordsError(
            f"`folder` is damaged: {name} is no complete Parquet file ({first_line(error)})."
        ) from error


def checked_rows(table: pa.Table, schema: pa.Schema, name: str) -> list[dict[str, Any]]:
    """The rows of a table that has the columns of a schema, and no empty value in them.

    Args:
        table: The table; of other columns, only those of predictors are kept.
        schema: The columns that it must have.
        name: The file, for the error.

    Raises:
        DamagedRecordsError: If a column is missing, has another type, or has an empty value.
    """
    names = [field.name for field in schema]
    if missing := [column for column in names if column not in table.column_names]:
        raise DamagedRecordsError(f"`folder` is damaged: {name} has no column `{missing[0]}`.")
    predictors = [column for column in table.column_names if column.startswith(PREDICTOR_PREFIX)]
    expected = pa.schema([*schema, *((column, pa.list_(pa.float64())) for column in predictors)])
    try:
        selected = table.select([*names, *predictors]).cast(expected)
    except (pa.ArrowException, ValueError) as error:
        raise DamagedRecordsError(
            f"`folder` is damaged: {name} has a column of another type ({first_line(error)})."
        ) from error
    for column in selected.column_names:
        values = selected[column]
        nested = values.combine_chunks().flatten() if pa.types.is_list(values.type) else values
        if values.null_count or nested.null_count:
            raise DamagedRecordsError(f"`folder` is damaged: {name} has a row without a value of `{column}`.")
    rows: list[dict[str, Any]] = selected.to_pylist()
    return rows


def check_node_row(row: Mapping[str, Any], teachers: int, modules: int, rollouts: int) -> None:
    """Check that the lists of a node's row have the lengths that belong together, and that its indices exist.

    Args:
        row: Of the table of nodes.
        teachers: Number of teachers.
        modules: Number of LoRA modules.
        rollouts: Number of rollouts.

    Raises:
        ValueError: If that is not so.
    """
    branches = len(row["tokens"])
    if not branches:
        raise ValueError("`tokens` has no value")
    directions = branches - 1 + teachers
    triangle = directions * (directions + 1) // 2
    lengths = dict.fromkeys(LIST_COLUMNS, branches) | {
        "teacher_tail": teachers,
        "teacher_probability": teachers * branches,
        "gram": triangle,
        "logit_gram": triangle,
        "module_gram": modules * triangle,
        **{column: teachers for column in row if column.startswith(PREDICTOR_PREFIX)},
    }
    for column, length in lengths.items():
        if len(row[column]) != length:
            raise ValueError(f"`{column}` has {len(row[column])} values in place of {length}")
    for column, count in (("rollout", rollouts), ("taken", branches)):
        if not 0 <= row[column] < count:
            raise ValueError(f"`{column}` is {row[column]}, but there are {count}")
    if row["depth"] < 0:
        raise ValueError(f"`depth` is {row['depth']}")


def check_updates(updates: Sequence[UpdateRecord], rollouts: int) -> None:
    """Check that the measured tokens of an update lie in rollouts that exist, unless the report kept no rollout at all.

    Raises:
        ValueError: If that is not so, or if products by module do not fit those on all parameters.
    """
    for update in updates:
        modules, cross = update.gram.modules, update.gram.cross
        if modules is not None and modules.cross.shape != (*cross.shape[:3], len(modules.names)):
            raise ValueError(f"`modules` has products of shape {modules.cross.shape} for {len(modules.names)} modules")
    for update in updates if rollouts else ():
        for tokens in (update.influence, update.features):
            indices = () if tokens is None else tokens.rollout
            if len(indices) and not 0 <= min(indices) <= max(indices) < rollouts:
                raise ValueError(f"`rollout` is {max(indices)}, but there are {rollouts}")


def check_preconditioned(report: ProbeReport, name: str) -> None:
    """Check that the report in another geometry, if there is one, is of the same probe.

    Raises:
        DamagedRecordsError: If it is not.
    """
    other = report.preconditioned
    if other is None:
        return
    same = (other.teachers, other.modules, len(other.nodes)) == (report.teachers, report.modules, len(report.nodes))
    if not same or not isinstance(other.settings.get("geometry"), str):
        raise DamagedRecordsError(f"`folder` is damaged: the two geometries in {name} are not of one probe.")


def check_report(report: ProbeReport) -> None:
    """Check that a report can be read again, before it is written.

    Raises:
        ValueError: If the records of its nodes do not fit its teachers, modules or rollouts.
    """
    for index, node in enumerate(report.nodes):
        directions = len(node.tokens) - 1 + len(report.teachers)
        if node.gram.shape != (len(report.modules), directions, directions) or not _fits(node, report):
            raise ValueError(
                f"`report` has a node {index} that does not fit its {len(report.teachers)} teachers, "
                f"{len(report.modules)} modules and {len(report.rollouts)} rollouts, so it could not be read again."
            )


def _fits(node: NodeRecord, report: ProbeReport) -> bool:
    return 0 <= node.rollout < len(report.rollouts) and len(node.teacher_tail) == len(report.teachers)
