"""Write a report to disk."""

import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from odp_callbacks.records import ProbeReport
from odp_callbacks.storage.schema import (
    NODES_FILE,
    PRECONDITIONED_FOLDER,
    ROLLOUT_SCHEMA,
    ROLLOUTS_FILE,
    node_schema,
    node_to_row,
    rollout_to_row,
)


def save(report: ProbeReport, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a report to a folder, either completely or not at all.

    Args:
        report: A probe's report.
        folder: Folder to create, with its parents.
        overwrite: Replace the folder if it exists.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists and ``overwrite`` is False.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise FileExistsError(f"`folder` exists: {target}. Give another one, or `overwrite=True`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The tables are written to a hidden folder beside the target, which is then renamed: no reader sees half a report.
    draft_folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_tables(report, draft_folder)
        if target.exists():
            shutil.rmtree(target)
        draft_folder.rename(target)
    except BaseException:
        shutil.rmtree(draft_folder, ignore_errors=True)
        raise
    return target


def _write_tables(report: ProbeReport, folder: Path) -> None:
    node_table = pa.Table.from_pylist([node_to_row(node) for node in report.nodes], node_schema(report))
    rollout_table = pa.Table.from_pylist([rollout_to_row(rollout) for rollout in report.rollouts], ROLLOUT_SCHEMA)
    parquet.write_table(node_table, folder / NODES_FILE, compression="zstd")
    parquet.write_table(rollout_table, folder / ROLLOUTS_FILE, compression="zstd")
    if report.preconditioned is not None:
        save(report.preconditioned, folder / PRECONDITIONED_FOLDER)
