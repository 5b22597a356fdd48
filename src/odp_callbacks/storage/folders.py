"""Folders of records: where they are, and how one takes the place of another at once."""

import ctypes
import os
import re
import shutil
from pathlib import Path

from odp_callbacks.files import draft_path
from odp_callbacks.storage.schema import MANIFEST_FILE, NODES_FILE

ATTEMPTS = 20
"""How often a folder is put into its place, or read, while other processes replace it."""
PREVIOUS_SUFFIX = ".previous"
AT_CURRENT_FOLDER = -100
EXCHANGE = 2
"""Flag of ``renameat2`` and ``renamex_np`` that lets two paths change places."""


def record_folders(folder: Path) -> list[Path]:
    """The folders of records that a folder stands for: itself, its ``records``, or those in either of them.

    Hidden folders are none: a process that is killed leaves the draft of a record under a hidden name.

    Args:
        folder: The folder.

    Returns:
        The folders, in the order of their names, in which numbers count as numbers; none if there are no records.
    """
    for candidate in (folder, folder / "records"):
        if holds_records(candidate):
            return [candidate]
    for parent in (folder, folder / "records"):
        if found := [child for child in _children(parent) if holds_records(child)]:
            return sorted(found, key=_sorting_key)
    return []


def holds_records(folder: Path) -> bool:
    """Whether a folder has a file of records; whether they can be read is another question."""
    existing = existing_folder(folder)
    return any((existing / name).exists() for name in (MANIFEST_FILE, NODES_FILE))


def existing_folder(folder: Path) -> Path:
    """The folder, or the previous one if a process was killed before it put the new one into its place."""
    previous = _previous(folder)
    return previous if not folder.exists() and previous.exists() else folder


def place_folder(draft: Path, target: Path, *, overwrite: bool) -> None:
    """Rename a folder, which may replace another; whenever this is interrupted, one of the two is at the target.

    Args:
        draft: A complete folder beside the target.
        target: Its place.
        overwrite: Whether it may replace another folder.

    Raises:
        FileExistsError: If there is another folder, and it must not be replaced.
        OSError: If the folder cannot be renamed.
    """
    for _ in range(ATTEMPTS):
        if not target.exists():
            try:
                draft.rename(target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise
            else:
                return
        if not overwrite:
            raise FileExistsError(f"`folder` exists: {target}. Give another one, or `overwrite=True`.")
        shutil.copymode(target, draft)
        if exchange(draft, target) or _replace_in_two_steps(draft, target):
            shutil.rmtree(draft, ignore_errors=True)
            return
    raise OSError(f"{target} could not be replaced, because other processes replace it all the time.")


def exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot do that."""
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    paths = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        return bool(library.renameat2(AT_CURRENT_FOLDER, paths[0], AT_CURRENT_FOLDER, paths[1], EXCHANGE) == 0)
    if hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*paths, EXCHANGE) == 0)
    return False


def _replace_in_two_steps(draft: Path, target: Path) -> bool:
    """Move the target aside and the draft into its place; between the two, :func:`existing_folder` finds the former.

    Afterwards the former folder lies at the draft's place. False if another process interfered.
    """
    previous = _previous(target)
    if previous.exists():  # left by a process that was killed; the target is newer
        leftover = draft_path(target)
        previous.rename(leftover)
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        target.rename(previous)
        draft.rename(target)
    except OSError:
        if previous.exists() and not target.exists():
            previous.rename(target)
            raise
        return False
    # Renamed first, so that nobody mistakes a half deleted folder for the previous one.
    previous.rename(draft)
    return True


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{PREVIOUS_SUFFIX}") if folder.name else folder


def _children(folder: Path) -> list[Path]:
    """Visible folders in a folder, and those of which only the previous one is left."""
    if not folder.is_dir():
        return []
    names = {path.name for path in folder.iterdir()}
    interrupted = {name[1:].removesuffix(PREVIOUS_SUFFIX) for name in names if name.endswith(PREVIOUS_SUFFIX)}
    return [folder / name for name in names | interrupted if name and not name.startswith(".")]


def _sorting_key(folder: Path) -> list[str | int]:
    """The parts of a name, of which every second is a number."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", folder.name))]
