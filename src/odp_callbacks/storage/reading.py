"""Read a report from disk, of the current version of the format or of an earlier one."""

import json
import os
from pathlib import Path
from typing import Any

from pyarrow import parquet

from odp_callbacks.records import ProbeReport
from odp_callbacks.storage.schema import (
    METADATA_KEY,
    NODES_FILE,
    PRECONDITIONED_FOLDER,
    ROLLOUTS_FILE,
    VERSION,
    metadata_to_step,
    row_to_node,
    row_to_rollout,
)

RENAMED_SETTINGS = {
    "seconds": "time_budget",
    "memory": "max_memory_bytes",
    "reward_seconds": "reward_timeout",
}
"""Settings of a probe that had other names in version 1."""


def load(folder: str | os.PathLike[str]) -> ProbeReport:
    """Read a report.

    Args:
        folder: Folder that :func:`~odp_callbacks.storage.save` wrote.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no records of odp-callbacks, or records of a version that this release cannot read.
    """
    path = Path(folder)
    node_table = parquet.read_table(path / NODES_FILE)
    encoded_metadata = (node_table.schema.metadata or {}).get(METADATA_KEY)
    if encoded_metadata is None:
        raise ValueError(f"`folder` holds no records of odp-callbacks: {path}.")
    metadata = _upgrade(json.loads(encoded_metadata), path)
    teachers, modules, step = tuple(metadata["teachers"]), tuple(metadata["modules"]), metadata["step"]
    rollouts = parquet.read_table(path / ROLLOUTS_FILE).to_pylist()
    other_geometry = _preconditioned_folder(path)
    return ProbeReport(
        teachers=teachers,
        modules=modules,
        rollouts=tuple(row_to_rollout(row) for row in rollouts),
        nodes=tuple(row_to_node(row, len(teachers), len(modules)) for row in node_table.to_pylist()),
        generated_tokens=metadata["generated_tokens"],
        continuations=metadata["continuations"],
        truncated=metadata["truncated"],
        stage_seconds=metadata["stage_seconds"],
        settings=metadata["settings"],
        step=None if step is None else metadata_to_step(step, len(teachers)),
        free=metadata["free"],
        token_text={int(token): text for token, text in metadata["token_text"].items()},
        preconditioned=None if other_geometry is None else load(other_geometry),
    )


def _upgrade(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """Metadata with the names of the current version.

    Raises:
        ValueError: If the version is unknown.
    """
    version = metadata.get("version")
    if version == VERSION:
        return metadata
    if version == 1:
        return _upgrade_from_version_1(metadata)
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"`folder` has version {version} of the records, but this release reads up to {VERSION}; "
            f"install a newer one: {path}."
        )
    raise ValueError(
        f"`folder` has records of the unknown version {version!r}; this release reads 1 to {VERSION}, so run the probe "
        f"again: {path}."
    )


def _upgrade_from_version_1(metadata: dict[str, Any]) -> dict[str, Any]:
    """Give entries their present names, and those that the first files lacked the value that they had implicitly."""
    settings = {RENAMED_SETTINGS.get(setting, setting): value for setting, value in metadata["settings"].items()}
    return {
        "token_text": {},
        **metadata,
        "stage_seconds": metadata["seconds"],
        "settings": {"geometry": "euclidean", **settings},
    }


def _preconditioned_folder(path: Path) -> Path | None:
    """Folder of the same probe in another geometry, if it was measured; version 1 called it ``in_metric``."""
    folders = [path / name for name in (PRECONDITIONED_FOLDER, "in_metric")]
    return next((folder for folder in folders if folder.exists()), None)
