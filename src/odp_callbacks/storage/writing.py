"""Write a report to disk."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from odp_callbacks.files import draft_path, local_path, raise_for_target, remove_old_drafts
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage.folders import holds_records, place_folder
from odp_callbacks.storage.manifest import write_manifest
from odp_callbacks.storage.schema import (
    NODES_FILE,
    PRECONDITIONED_FOLDER,
    ROLLOUT_SCHEMA,
    ROLLOUTS_FILE,
    node_schema,
    node_to_row,
    predictor_names,
    rollout_to_row,
)
from odp_callbacks.storage.teacher_responses import write_teacher_responses
from odp_callbacks.storage.updates import write_updates
from odp_callbacks.storage.validation import check_report


def save(report: ProbeReport, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a report to a folder, either completely or not at all.

    Args:
        report: A probe's report.
        folder: Folder to create, with its parents.
        overwrite: Replace the folder if it exists.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists and ``overwrite`` is False, or if it holds something else than records.
        OSError: If it cannot be written. What was there is then still there.
        ValueError: If ``folder`` is a URL, or if the report could not be read again.
    """
    given = local_path("folder", folder)
    target = Path(os.path.realpath(given))  # a link keeps pointing to its folder, which is replaced
    _check_place(target, overwrite)
    check_report(report)
    draft = draft_path(target)
    try:
        # Everything is written to a hidden folder beside the target, so that no reader sees half a report.
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        _write_files(report, draft)
        place_folder(draft, target, overwrite=overwrite)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise_for_target(error, target)
    remove_old_drafts(target.parent)
    return given


def _check_place(target: Path, overwrite: bool) -> None:
    """Check that nothing but records is at the target, and that these may be replaced.

    Raises:
        FileExistsError: If that is not so.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"`folder` is a file: {target}. Give a folder.")
    if not overwrite:
        raise FileExistsError(f"`folder` exists: {target}. Give another one, or `overwrite=True`.")
    if not holds_records(target) and any(target.iterdir()):
        raise FileExistsError(f"`folder` holds other files than records: {target}. Give another one.")


def _write_files(report: ProbeReport, folder: Path) -> None:
    predictors = predictor_names(report)
    node_table = pa.Table.from_pylist([node_to_row(node, predictors) for node in report.nodes], node_schema(report))
    rollout_table = pa.Table.from_pylist([rollout_to_row(rollout) for rollout in report.rollouts], ROLLOUT_SCHEMA)
    for table, name in ((node_table, NODES_FILE), (rollout_table, ROLLOUTS_FILE)):
        # Opened here, because pyarrow does not take every path that the system takes.
        with (folder / name).open("wb") as file:
            parquet.write_table(table, file, compression="zstd")
    write_updates(report.updates, folder)
    write_teacher_responses(report.teacher_responses, folder)
    if report.preconditioned is not None:
        preconditioned_folder = folder / PRECONDITIONED_FOLDER
        preconditioned_folder.mkdir()
        _write_files(report.preconditioned, preconditioned_folder)
    write_manifest(folder)
