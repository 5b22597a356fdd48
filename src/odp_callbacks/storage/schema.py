"""The format of the records on disk: columns, metadata and how a record becomes a row and a row a record.

Whoever changes the format raises :data:`VERSION`, teaches :mod:`~odp_callbacks.storage.reading` the previous one and
keeps an example of each version in ``tests/data/records``.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from odp_callbacks.records import Floats, NodeRecord, ProbeReport, RolloutRecord, StepSums

VERSION = 3
METADATA_KEY = b"odp_callbacks"
NODES_FILE, ROLLOUTS_FILE = "nodes.parquet", "rollouts.parquet"
MANIFEST_FILE = "manifest.json"
"""The hash of each other file in the folder."""
PRECONDITIONED_FOLDER = "preconditioned"
"""Folder, inside that of the probe, of the same probe in another geometry."""
PREDICTOR_PREFIX = "predictor_"
RUN_SETTING = "run"
"""Setting under which a callback saves which training run a probe belongs to."""

SCALAR_COLUMNS = {
    "rollout": pa.int64(), "question": pa.string(), "depth": pa.int64(), "inclusion": pa.float64(),
    "correct": pa.bool_(), "taken": pa.int64(), "gradient_inclusion": pa.float64(),
}  # fmt: skip
LIST_COLUMNS = {
    "tokens": pa.int64(), "probability": pa.float64(), "weight": pa.float64(), "tail": pa.bool_(), "count": pa.int64(),
    "total": pa.float64(), "total_square": pa.float64(), "exact": pa.bool_(), "teacher_tail": pa.float64(),
}  # fmt: skip
MATRIX_COLUMNS = {
    "teacher_probability": pa.float64(), "gram": pa.float64(), "logit_gram": pa.float64(), "module_gram": pa.float32(),
}  # fmt: skip
ROLLOUT_SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("prompt", pa.string()),
        ("pieces", pa.list_(pa.string())),
        ("text", pa.string()),
        ("reward", pa.float64()),
        ("correct", pa.bool_()),
        ("truncated", pa.bool_()),
    ]
)


def node_schema(report: ProbeReport) -> pa.Schema:
    """Columns of the table of nodes, with the metadata of the report."""
    return pa.schema(
        [
            *SCALAR_COLUMNS.items(),
            *((column, pa.list_(value_type)) for column, value_type in {**LIST_COLUMNS, **MATRIX_COLUMNS}.items()),
            *((PREDICTOR_PREFIX + predictor, pa.list_(pa.float64())) for predictor in predictor_names(report)),
        ],
        metadata={METADATA_KEY: json.dumps(_metadata(report)).encode()},
    )


def predictor_names(report: ProbeReport) -> list[str]:
    """Names of the predictors that any node has; a report of several probes may hold nodes that lack one."""
    return sorted({predictor for node in report.nodes for predictor in node.predictors})


def _metadata(report: ProbeReport) -> dict[str, Any]:
    """What belongs to the report as a whole, as JSON values."""
    step = report.step
    return {
        "version": VERSION,
        "teachers": report.teachers,
        "modules": report.modules,
        "generated_tokens": dict(report.generated_tokens),
        "continuations": report.continuations,
        "truncated": report.truncated,
        "left_out": dict(report.left_out),
        "slot_steps": dict(report.slot_steps),
        "stage_seconds": dict(report.stage_seconds),
        "settings": dict(report.settings),
        "step": None
        if step is None
        else {"question": step.question, "correct": step.correct, "gram": step.gram.ravel().tolist()},
        "token_text": {str(token): encodable(text) for token, text in report.token_text.items()},
    }


def encodable(value: Any) -> Any:
    """Replace lone surrogates, which a byte-level tokenizer may produce but no file can hold; tuples become lists."""
    if isinstance(value, tuple):
        return [encodable(part) for part in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def rollout_to_row(rollout: RolloutRecord) -> dict[str, Any]:
    """Row of the table of rollouts."""
    return {field.name: encodable(getattr(rollout, field.name)) for field in fields(rollout)}


def row_to_rollout(row: Mapping[str, Any]) -> RolloutRecord:
    """Inverse of :func:`rollout_to_row`."""
    return RolloutRecord(**{**row, "pieces": tuple(row["pieces"])})


def node_to_row(node: NodeRecord, predictors: Iterable[str]) -> dict[str, Any]:
    """Row of the table of nodes.

    Args:
        node: The node.
        predictors: Names of the predictors in the table; one that the node lacks is NaN.
    """
    unknown = np.full(len(node.teacher_tail), np.nan)
    upper = np.triu_indices(len(node.logit_gram))
    return {
        **{column: getattr(node, column) for column in SCALAR_COLUMNS},
        **{column: getattr(node, column).tolist() for column in LIST_COLUMNS},
        "teacher_probability": node.teacher_probability.ravel().tolist(),
        "gram": node.gram.sum(axis=0)[upper],
        "logit_gram": node.logit_gram[upper],
        "module_gram": node.gram[:, upper[0], upper[1]].ravel().astype(np.float32),
        **{PREDICTOR_PREFIX + name: node.predictors.get(name, unknown).tolist() for name in predictors},
    }


def row_to_node(row: Mapping[str, Any], teachers: int, modules: int) -> NodeRecord:
    """Inverse of :func:`node_to_row`, except that Gram matrices of single modules have the precision of float32.

    Args:
        row: Of the table of nodes.
        teachers: Number of teachers, ``K``.
        modules: Number of LoRA modules, ``M``.
    """
    list_values: dict[str, Any] = {
        column: np.array(row[column], dtype=value_type.to_pandas_dtype()) for column, value_type in LIST_COLUMNS.items()
    }
    direction_count = len(list_values["tokens"]) - 1 + teachers
    module_triangles = np.array(row["module_gram"], dtype=np.float64).reshape(modules, -1)
    gram = np.zeros((0, direction_count, direction_count))
    if modules:
        gram = np.stack([_symmetric(triangle, direction_count) for triangle in module_triangles])
        # Figures on all parameters are differences of sums over modules, for which float32 is too coarse. Adding what
        # rounding took away to the first module makes the sum exact again.
        gram[0] += _symmetric(np.array(row["gram"]), direction_count) - gram.sum(axis=0)
    return NodeRecord(
        **{column: row[column] for column in SCALAR_COLUMNS},
        **list_values,
        gram=gram,
        logit_gram=_symmetric(np.array(row["logit_gram"]), direction_count),
        teacher_probability=np.array(row["teacher_probability"]).reshape(teachers, -1),
        predictors={
            column.removeprefix(PREDICTOR_PREFIX): np.array(values, dtype=np.float64)
            for column, values in row.items()
            if column.startswith(PREDICTOR_PREFIX)
        },
    )


def metadata_to_step(step: Mapping[str, Any], teachers: int) -> StepSums:
    """Summed gradients from their entry in the metadata."""
    groups, vectors = len(step["question"]), 2 + teachers
    gram = np.array(step["gram"], dtype=np.float64).reshape(groups, vectors, groups, vectors)
    return StepSums(tuple(step["question"]), tuple(step["correct"]), gram)


def _symmetric(upper_triangle: Floats, size: int) -> Floats:
    """Symmetric matrix ``(size, size)`` from its upper triangle, row by row."""
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = upper_triangle
    return np.asarray(matrix + np.triu(matrix, 1).T, dtype=np.float64)
