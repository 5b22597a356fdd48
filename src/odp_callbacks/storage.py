"""Records on disk: a folder of two Parquet tables that pandas, polars and DuckDB read, without pickle.

``nodes.parquet`` has a row for each node, ``rollouts.parquet`` one for each rollout; what belongs to the probe as a
whole is JSON in the metadata of the first, under the key ``odp_callbacks``, with the format's version. The columns are
the attributes of :class:`~odp_callbacks.records.NodeRecord` and :class:`~odp_callbacks.records.RolloutRecord`:

- vectors are lists; ``gram`` is the upper triangle of the Gram matrix on all LoRA parameters, row by row, and
  ``logit_gram`` that on the logits (float64);
- ``module_gram`` is the same for each module, one after another (float32: it is the bulk of the file);
- ``teacher_probability`` is row by row, ``(K, A)``;
- each predictor is a column ``predictor_<name>``.

The same probe in another geometry lies in the folder ``preconditioned``, with the same two tables.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from odp_callbacks.records import Floats, NodeRecord, ProbeReport, RolloutRecord, StepSums, step_sums

VERSION = 1
KEY = b"odp_callbacks"
IN_METRIC = "preconditioned"
"""Folder of the same probe in another geometry, inside that of the probe."""
_PREDICTOR = "predictor_"


def save(report: ProbeReport, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a report, all of it or nothing.

    Args:
        report: A probe's report.
        folder: Where to; its parents are made.
        overwrite: Replace what is there.

    Raises:
        FileExistsError: If the folder exists and is not to be replaced.

    Returns:
        The folder.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise FileExistsError(f"`folder` exists: {target}. Give another one, or `overwrite=True`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there: a reader never sees half of it.
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        table = pa.Table.from_pylist([_node_row(node) for node in report.nodes], _node_schema(report))
        parquet.write_table(table, draft / "nodes.parquet", compression="zstd")
        rollouts = [{f.name: _plain(getattr(r, f.name)) for f in fields(r)} for r in report.rollouts]
        parquet.write_table(pa.Table.from_pylist(rollouts, _ROLLOUTS), draft / "rollouts.parquet", compression="zstd")
        if report.preconditioned is not None:
            save(report.preconditioned, draft / IN_METRIC)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def load(folder: str | os.PathLike[str]) -> ProbeReport:
    """Read a report.

    Args:
        folder: What :func:`save` wrote.

    Raises:
        ValueError: If it is none of ours, or of a later version of the format.
    """
    path = Path(folder)
    table = parquet.read_table(path / "nodes.parquet")
    meta = (table.schema.metadata or {}).get(KEY)
    if meta is None:
        raise ValueError(f"`folder` holds no records of odp-callbacks: {path}.")
    whole = json.loads(meta)
    if whole["version"] > VERSION:
        raise ValueError(
            f"`folder` has version {whole['version']} of the records, but this release reads up to {VERSION}; "
            f"install a newer one: {path}."
        )
    modules = tuple(whole["modules"])
    step = whole["step"]
    rollouts = parquet.read_table(path / "rollouts.parquet").to_pylist()
    return ProbeReport(
        teachers=tuple(whole["teachers"]),
        modules=modules,
        rollouts=tuple(RolloutRecord(**{**row, "pieces": tuple(row["pieces"])}) for row in rollouts),
        nodes=tuple(_node(row, len(whole["teachers"]), len(modules)) for row in table.to_pylist()),
        generated_tokens=whole["generated_tokens"],
        continuations=whole["continuations"],
        truncated=whole["truncated"],
        seconds=whole["seconds"],
        settings=whole["settings"],
        step=None if step is None else _step(step, len(whole["teachers"])),
        free=whole["free"],
        token_text={int(k): text for k, text in whole["token_text"].items()},
        preconditioned=load(path / IN_METRIC) if (path / IN_METRIC).exists() else None,
    )


def concatenate(reports: Sequence[ProbeReport]) -> ProbeReport:
    """Put reports of several probes or ranks together: every summary can be computed of them all.

    Questions with the same id are the same question: its nodes stay in one cluster.

    Args:
        reports: At least one, with the same teachers and modules.

    Raises:
        ValueError: If they do not fit each other.
    """
    if not reports:
        raise ValueError("`reports` is empty; give at least one.")
    first = reports[0]
    for other in reports[1:]:
        if _kind(other) != _kind(first):
            raise ValueError(
                f"`reports` must have the same teachers, modules, geometry and mode, but teachers are {first.teachers} "
                f"and {other.teachers}, with {len(first.modules)} and {len(other.modules)} modules."
            )
    nodes: list[NodeRecord] = []
    offset = 0
    for report in reports:
        nodes += [replace(node, rollout=node.rollout + offset) for node in report.nodes]
        offset += len(report.rollouts)
    return replace(
        first,
        rollouts=tuple(rollout for report in reports for rollout in report.rollouts),
        nodes=tuple(nodes),
        generated_tokens=_add(report.generated_tokens for report in reports),
        continuations=sum(report.continuations for report in reports),
        truncated=sum(report.truncated for report in reports),
        seconds=_add(report.seconds for report in reports),
        token_text={k: text for report in reports for k, text in report.token_text.items()},
        # A step's gradients are of one student at one moment; see :func:`merge`.
        step=first.step if len(reports) == 1 else None,
        preconditioned=_in_metric(reports, concatenate),
    )


def merge(parts: Sequence[ProbeReport]) -> ProbeReport:
    """The parts of one probe, whose questions several processes measured at the same time, as one report.

    Args:
        parts: At least one, in the order of the questions.

    Raises:
        ValueError: If they do not fit each other.
    """
    if any(len(part.modules) != len(parts[0].modules) for part in parts):
        # Where one projected its gradients, modules cannot be told apart.
        whole = min((part.modules for part in parts), key=len)
        parts = [part if part.modules == whole else _summed(part, whole) for part in parts]
    found = concatenate(parts)
    seconds = {name: max(part.seconds.get(name, 0.0) for part in parts) for name in found.seconds}
    other = (
        None
        if found.preconditioned is None
        else merge([p.preconditioned for p in parts if p.preconditioned is not None])
    )
    return replace(found, seconds=seconds, step=_together([part.step for part in parts]), preconditioned=other)


def _summed(part: ProbeReport, modules: tuple[str, ...]) -> ProbeReport:
    nodes = tuple(replace(node, gram=node.gram.sum(axis=0, keepdims=True)) for node in part.nodes)
    return replace(
        part, modules=modules, nodes=nodes, preconditioned=part.preconditioned and _summed(part.preconditioned, modules)
    )


def _together(steps: Sequence[StepSums | None]) -> StepSums | None:
    """Summed gradients of several parts; None where a file did not keep the vectors, and with them inner products."""
    vectors = [step.vectors for step in steps if step is not None and step.vectors is not None]
    if len(vectors) < len(steps):
        return None
    known = [step for step in steps if step is not None]
    return step_sums(
        tuple(q for step in known for q in step.question),
        tuple(c for step in known for c in step.correct),
        np.concatenate(vectors),
    )


def pool(reports: Sequence[ProbeReport]) -> ProbeReport:
    """Add the continuations of several probes of the same nodes and branches.

    Args:
        reports: At least one; the same rollouts, nodes and branches in all.

    Raises:
        ValueError: If nodes or branches differ.
    """
    if not reports:
        raise ValueError("`reports` is empty; give at least one.")
    first = reports[0]
    keys = [_key(node) for node in first.nodes]
    if any([_key(node) for node in other.nodes] != keys for other in reports[1:]):
        raise ValueError("`reports` must have the same nodes and branches; `concatenate` takes different ones.")
    nodes = []
    for group in zip(*(report.nodes for report in reports), strict=True):
        known = group[0].exact
        total = {
            name: np.where(known, getattr(group[0], name), sum(getattr(node, name) for node in group))
            for name in ("count", "total", "total_square")
        }
        nodes.append(replace(group[0], **total))
    spent = [r.generated_tokens.get("continuations", 0) for r in reports]
    return replace(
        first,
        nodes=tuple(nodes),
        generated_tokens={**first.generated_tokens, "continuations": sum(spent)},
        continuations=sum(r.continuations for r in reports),
        truncated=sum(r.truncated for r in reports) - (len(reports) - 1) * sum(r.truncated for r in first.rollouts),
        seconds=_add(report.seconds for report in reports),
        step=first.step if len(reports) == 1 else None,
        preconditioned=_in_metric(reports, pool),
    )


def _in_metric(
    reports: Sequence[ProbeReport], together: Callable[[Sequence[ProbeReport]], ProbeReport]
) -> ProbeReport | None:
    others = [report.preconditioned for report in reports if report.preconditioned is not None]
    return together(others) if len(others) == len(reports) else None


def _plain(value: Any) -> Any:
    """Half of a surrogate pair, which a byte-level tokenizer may give, is no text that a file can hold."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _kind(report: ProbeReport) -> tuple[object, ...]:
    return report.teachers, report.modules, report.free, report.settings.get("geometry")


def _key(node: NodeRecord) -> tuple[object, ...]:
    return node.rollout, node.question, node.depth, tuple(node.tokens.tolist()), tuple(node.weight.tolist())


def _add(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for count in counts:
        for name, value in count.items():
            total[name] = total.get(name, 0) + value
    return total


_LISTS = {
    "tokens": pa.int64(), "probability": pa.float64(), "weight": pa.float64(), "tail": pa.bool_(), "count": pa.int64(),
    "total": pa.float64(), "total_square": pa.float64(), "exact": pa.bool_(), "teacher_tail": pa.float64(),
}  # fmt: skip
_ROLLOUTS = pa.schema(
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


def _node_schema(report: ProbeReport) -> pa.Schema:
    step = report.step
    whole = {
        "version": VERSION,
        "teachers": report.teachers,
        "modules": report.modules,
        "generated_tokens": dict(report.generated_tokens),
        "continuations": report.continuations,
        "truncated": report.truncated,
        "seconds": dict(report.seconds),
        "settings": dict(report.settings),
        "step": None
        if step is None
        else {"question": step.question, "correct": step.correct, "gram": step.gram.ravel().tolist()},
        "free": report.free,
        "token_text": {str(k): _plain(text) for k, text in report.token_text.items()},
    }
    predictors = sorted({name for node in report.nodes for name in node.predictors})
    return pa.schema(
        [
            ("rollout", pa.int64()),
            ("question", pa.string()),
            ("depth", pa.int64()),
            ("inclusion", pa.float64()),
            ("correct", pa.bool_()),
            ("taken", pa.int64()),
            *((name, pa.list_(kind)) for name, kind in _LISTS.items()),
            ("teacher_probability", pa.list_(pa.float64())),
            ("gram", pa.list_(pa.float64())),
            ("logit_gram", pa.list_(pa.float64())),
            ("module_gram", pa.list_(pa.float32())),
            *((_PREDICTOR + name, pa.list_(pa.float64())) for name in predictors),
        ],
        metadata={KEY: json.dumps(whole).encode()},
    )


def _node_row(node: NodeRecord) -> dict[str, Any]:
    upper = np.triu_indices(len(node.logit_gram))
    return {
        **{name: getattr(node, name) for name in ("rollout", "question", "depth", "inclusion", "correct", "taken")},
        **{name: getattr(node, name).tolist() for name in _LISTS},
        "teacher_probability": node.teacher_probability.ravel().tolist(),
        "gram": node.gram.sum(axis=0)[upper],
        "logit_gram": node.logit_gram[upper],
        "module_gram": node.gram[:, upper[0], upper[1]].ravel().astype(np.float32),
        **{_PREDICTOR + name: values.tolist() for name, values in node.predictors.items()},
    }


def _node(row: dict[str, Any], teachers: int, modules: int) -> NodeRecord:
    kinds: dict[str, Any] = {"tokens": np.int64, "count": np.int64, "tail": np.bool_, "exact": np.bool_}
    lists: dict[str, Any] = {name: np.array(row[name], dtype=kinds.get(name, np.float64)) for name in _LISTS}
    size = len(lists["tokens"]) - 1 + teachers
    parts = np.array(row["module_gram"], dtype=np.float64).reshape(modules, -1)
    gram = np.stack([_square(part, size) for part in parts]) if modules else np.zeros((0, size, size))
    if modules:
        # Single precision is enough for a module, not for differences of all: the whole is exact again.
        gram[0] += _square(np.array(row["gram"]), size) - gram.sum(axis=0)
    return NodeRecord(
        **{name: row[name] for name in ("rollout", "question", "depth", "inclusion", "correct", "taken")},
        **lists,
        gram=gram,
        logit_gram=_square(np.array(row["logit_gram"]), size),
        teacher_probability=np.array(row["teacher_probability"]).reshape(teachers, -1),
        predictors={
            name.removeprefix(_PREDICTOR): np.array(values, dtype=np.float64)
            for name, values in row.items()
            if name.startswith(_PREDICTOR)
        },
    )


def _square(upper: Floats, size: int) -> Floats:
    found = np.zeros((size, size))
    found[np.triu_indices(size)] = upper
    return np.asarray(found + np.triu(found, 1).T, dtype=np.float64)


def _step(step: Mapping[str, Any], teachers: int) -> StepSums:
    groups, vectors = len(step["question"]), 2 + teachers
    gram = np.array(step["gram"], dtype=np.float64).reshape(groups, vectors, groups, vectors)
    return StepSums(tuple(step["question"]), tuple(step["correct"]), gram)
