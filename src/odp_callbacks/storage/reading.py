"""Read a report from disk, of the current version of the format or of an earlier one."""

import os
from collections.abc import Mapping
from typing import Any
from zipfile import BadZipFile

import pyarrow as pa

from odp_callbacks.files import local_path, parse_json_object
from odp_callbacks.records import NodeRecord, ProbeReport
from odp_callbacks.storage.manifest import DamagedRecordsError, check_version, read_contents
from odp_callbacks.storage.schema import (
    MANIFEST_FILE,
    METADATA_KEY,
    NODES_FILE,
    PRECONDITIONED_FOLDER,
    ROLLOUT_SCHEMA,
    ROLLOUTS_FILE,
    metadata_to_step,
    row_to_node,
    row_to_rollout,
)
from odp_callbacks.storage.teacher_responses import TEACHER_RESPONSES_FILE, read_teacher_responses
from odp_callbacks.storage.updates import UPDATES_FILE, read_updates
from odp_callbacks.storage.validation import (
    NODE_SCHEMA,
    check_metadata,
    check_node_row,
    check_preconditioned,
    check_updates,
    checked_rows,
    read_table,
)
from odp_callbacks.update_records import UpdateRecord

RENAMED_SETTINGS = {
    "time_budget": "seconds",
    "memory": "max_memory_bytes",
    "reward_seconds": "reward_timeout",
}
"""Settings of a probe that had other names in earlier records."""
FIRST_VERSION_WITH_INCLUSION = 3
"""Before this version, the gradients of every node were computed."""
PRECONDITIONED_FOLDERS = (PRECONDITIONED_FOLDER, "in_metric")
"""The folder of the same probe in another geometry, and what version 1 called it."""


def load(folder: str | os.PathLike[str]) -> ProbeReport:
    """Read a report.

    Args:
        folder: Folder that :func:`~odp_callbacks.storage.save` wrote.

    Raises:
        FileNotFoundError: If there is no such folder.
        DamagedRecordsError: If a file is missing, or is not what was written.
        ValueError: If it holds no records of odp-callbacks, or records of a version that this release cannot read.
    """
    path = local_path("folder", folder)
    return _report(read_contents(path), str(path))


def _report(contents: Mapping[str, bytes], name: str) -> ProbeReport:
    """The report in the files of a folder.

    Args:
        contents: The content of each file, by its name.
        name: The folder, for errors.
    """
    metadata, rows = _read_nodes(contents[NODES_FILE], name, has_manifest=MANIFEST_FILE in contents)
    if ROLLOUTS_FILE not in contents:
        raise DamagedRecordsError(f"`folder` is damaged: {ROLLOUTS_FILE} is missing in {name}.")
    rollouts_name = f"{name}/{ROLLOUTS_FILE}"
    rollout_rows = checked_rows(read_table(contents[ROLLOUTS_FILE], rollouts_name), ROLLOUT_SCHEMA, rollouts_name)
    teachers, modules, step = tuple(metadata["teachers"]), tuple(metadata["modules"]), metadata["step"]
    report = ProbeReport(
        teachers=teachers,
        modules=modules,
        rollouts=tuple(row_to_rollout(row) for row in rollout_rows),
        nodes=_nodes(rows, len(teachers), len(modules), len(rollout_rows), name),
        generated_tokens=metadata["generated_tokens"],
        continuations=metadata["continuations"],
        truncated=metadata["truncated"],
        left_out=metadata["left_out"],
        slot_steps=metadata["slot_steps"],
        stage_seconds=metadata["stage_seconds"],
        settings=metadata["settings"],
        step=None if step is None else metadata_to_step(step, len(teachers)),
        updates=_updates(contents, len(rollout_rows), name),
        token_text={int(token): text for token, text in metadata["token_text"].items()},
        teacher_responses=read_teacher_responses(contents.get(TEACHER_RESPONSES_FILE), name),
        preconditioned=_preconditioned(contents, name),
    )
    check_preconditioned(report, name)
    return report


def _read_nodes(content: bytes, name: str, *, has_manifest: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metadata of a report, with the names of the current version, and the rows of its nodes."""
    table_name = f"{name}/{NODES_FILE}"
    table = read_table(content, table_name)
    encoded_metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    if encoded_metadata is None:
        raise ValueError(f"`folder` holds no records of odp-callbacks: {name}.")
    try:
        metadata = parse_json_object(encoded_metadata, f"the metadata of {table_name}")
    except ValueError as error:
        raise DamagedRecordsError(f"`folder` is damaged: {error}") from error
    if "version" not in metadata:
        raise DamagedRecordsError(f"`folder` is damaged: the metadata of {table_name} lack `version`.")
    check_version(metadata["version"], name)
    if metadata["version"] == 1:
        metadata = _upgrade_from_version_1(metadata)
    elif not has_manifest:
        raise DamagedRecordsError(f"`folder` is damaged: {MANIFEST_FILE} is missing in {name}.")
    if metadata["version"] < FIRST_VERSION_WITH_INCLUSION:
        metadata, table = _with_present_names(metadata), _with_all_gradients(table)
    metadata = {"left_out": {}, "slot_steps": {}, **metadata}  # which the first files lacked
    check_metadata(metadata, name)
    if metadata.pop("free", False):
        raise ValueError(
            f"`folder` holds a probe in the free mode, which update gain replaced: {name}. "
            "Measure again with `budget=0`."
        )
    return metadata, checked_rows(table, NODE_SCHEMA, table_name)


def _with_present_names(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata with the settings of a probe by their present names."""
    if not isinstance(settings := metadata.get("settings"), dict):
        return metadata
    renamed = {RENAMED_SETTINGS.get(setting, setting): value for setting, value in settings.items()}
    return {**metadata, "settings": renamed}


def _with_all_gradients(table: pa.Table) -> pa.Table:
    """A table of nodes whose gradients were all computed, with the column that says so."""
    return table.append_column("gradient_inclusion", pa.array([1.0] * len(table), pa.float64()))


def _nodes(rows: list[dict[str, Any]], teachers: int, modules: int, rollouts: int, name: str) -> tuple[NodeRecord, ...]:
    nodes = []
    for index, row in enumerate(rows):
        try:
            check_node_row(row, teachers, modules, rollouts)
        except ValueError as error:
            raise DamagedRecordsError(f"`folder` is damaged: in row {index} of {name}/{NODES_FILE} {error}.") from error
        nodes.append(row_to_node(row, teachers, modules))
    return tuple(nodes)


def _updates(contents: Mapping[str, bytes], rollouts: int, name: str) -> tuple[UpdateRecord, ...]:
    try:
        updates = read_updates(contents.get(UPDATES_FILE))
        check_updates(updates, rollouts)
    except (ValueError, KeyError, TypeError, OSError, BadZipFile) as error:
        raise DamagedRecordsError(f"`folder` is damaged: {name}/{UPDATES_FILE} cannot be read ({error}).") from error
    return updates


def _preconditioned(contents: Mapping[str, bytes], name: str) -> ProbeReport | None:
    """The same probe in another geometry, if it was measured."""
    for folder in PRECONDITIONED_FOLDERS:
        prefix = f"{folder}/"
        part = {path.removeprefix(prefix): content for path, content in contents.items() if path.startswith(prefix)}
        if NODES_FILE in part:
            part |= {MANIFEST_FILE: contents[MANIFEST_FILE]} if MANIFEST_FILE in contents else {}
            return _report(part, f"{name}/{folder}")
    return None


def _upgrade_from_version_1(metadata: dict[str, Any]) -> dict[str, Any]:
    """Give entries their present names, and those that the first files lacked the value that they had implicitly."""
    upgraded = {"token_text": {}, **metadata}
    if "seconds" in metadata:
        upgraded["stage_seconds"] = metadata["seconds"]
    if isinstance(settings := metadata.get("settings"), dict):
        upgraded["settings"] = {"geometry": "euclidean", **settings}
    return upgraded
