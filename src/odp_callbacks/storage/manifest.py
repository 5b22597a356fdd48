"""The list of the files of a record with the hash of each, so that no damaged file is read as data."""

import json
import os
from hashlib import sha256
from pathlib import Path, PurePosixPath

from odp_callbacks.files import parse_json_object
from odp_callbacks.storage import schema
from odp_callbacks.storage.folders import ATTEMPTS, existing_folder
from odp_callbacks.storage.schema import MANIFEST_FILE, NODES_FILE, PRECONDITIONED_FOLDER, ROLLOUTS_FILE

FILES_WITHOUT_MANIFEST = tuple(
    prefix + name for prefix in ("", f"{PRECONDITIONED_FOLDER}/", "in_metric/") for name in (NODES_FILE, ROLLOUTS_FILE)
)
"""Files of version 1, which had no manifest."""


class DamagedRecordsError(ValueError):
    """Records are incomplete, or are not what was written."""


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files in a folder and in the folders below it, and flush them to the disk."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        # A manifest below is one for those who read that folder alone; here its files are listed themselves.
        if path.is_file() and path.name != MANIFEST_FILE:
            hashes[path.relative_to(folder).as_posix()] = sha256(path.read_bytes()).hexdigest()
            _flush(path)
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps({"version": schema.VERSION, "sha256": hashes}, indent=1), encoding="utf-8")
    _flush(manifest)


def read_contents(folder: Path) -> dict[str, bytes]:
    """Read the files of a record and check them; what is returned is what was checked.

    Args:
        folder: The folder.

    Returns:
        The content of each file by its name, relative to the folder; the manifest is one of them, if there is one.

    Raises:
        FileNotFoundError: If there is no such folder.
        DamagedRecordsError: If a file is missing, or is not what was written.
        ValueError: If the folder holds no records, or those of a later version.
    """
    for _ in range(ATTEMPTS):
        existing = existing_folder(folder)
        manifest = _read(existing / MANIFEST_FILE)
        try:
            return _read_once(existing, manifest)
        except (ValueError, FileNotFoundError):
            # Another process may have put a new record into its place in the meantime; then that one is read.
            if _read(existing_folder(folder) / MANIFEST_FILE) == manifest:
                raise
    raise DamagedRecordsError(f"{folder} cannot be read, because other processes replace it all the time.")


def _read_once(folder: Path, manifest: bytes | None) -> dict[str, bytes]:
    if not folder.exists():
        raise FileNotFoundError(f"`folder` names {str(folder)!r}, which does not exist.")
    if manifest is None:
        contents = {name: content for name in FILES_WITHOUT_MANIFEST if (content := _read(folder / name)) is not None}
        if NODES_FILE not in contents:
            raise ValueError(f"`folder` holds no records of odp-callbacks: {folder}.")
        return contents
    contents = {MANIFEST_FILE: manifest}
    for name, expected_hash in _hashes(manifest, folder).items():
        content = _read(folder / name)
        if content is None:
            raise DamagedRecordsError(f"`folder` is damaged: {name} is missing in {folder}.")
        if sha256(content).hexdigest() != expected_hash:
            raise DamagedRecordsError(f"`folder` is damaged: {name} is not what was written to {folder}.")
        contents[name] = content
    return contents


def _hashes(manifest: bytes, folder: Path) -> dict[str, str]:
    """The hash of each file, from the bytes of the manifest."""
    try:
        entries = parse_json_object(manifest, str(folder / MANIFEST_FILE))
    except ValueError as error:
        raise DamagedRecordsError(f"`folder` is damaged: {error}") from error
    version, hashes = entries.get("version"), entries.get("sha256")
    check_version(version, folder)
    valid = isinstance(hashes, dict) and all(
        isinstance(value, str) and ".." not in PurePosixPath(name).parts and not PurePosixPath(name).is_absolute()
        for name, value in hashes.items()
    )
    if not isinstance(hashes, dict) or not valid or NODES_FILE not in hashes or ROLLOUTS_FILE not in hashes:
        raise DamagedRecordsError(f"`folder` is damaged: {MANIFEST_FILE} in {folder} does not list its files.")
    return hashes


def check_version(version: object, folder: Path | str) -> None:
    """Check that this release reads a version of the format.

    Raises:
        ValueError: If it does not.
    """
    if type(version) is int and 1 <= version <= schema.VERSION:
        return
    if type(version) is int and version > schema.VERSION:
        raise ValueError(
            f"`folder` has version {version} of the records, but this release reads up to {schema.VERSION}; "
            f"install a newer one: {folder}."
        )
    raise ValueError(
        f"`folder` has records of the unknown version {version!r}; this release reads 1 to {schema.VERSION}, "
        f"so run the probe again: {folder}."
    )


def _read(path: Path) -> bytes | None:
    """The content of a file; None if there is none."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _flush(path: Path) -> None:
    """Wait until the disk has a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
