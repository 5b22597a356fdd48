"""Paths that users give, and files that appear whole or not at all."""

import json
import os
import re
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import Any

DRAFT_PREFIX = ".odp-draft-"
"""How the names of unfinished files and folders begin; a name that begins with a dot is never taken for a result."""
SECONDS_OF_A_DRAFT = 3600
"""After this time, the process that wrote a draft is taken for dead."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|.*://")


def local_path(argument: str, path: str | bytes | os.PathLike[Any]) -> Path:
    """The path of a local file or folder that a user gave; ``~`` is the user's home.

    Args:
        argument: The argument's name, for the error.
        path: What was given.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty, or a URL such as ``s3://bucket/records``.

    Examples:
        >>> local_path("records", "runs/first").as_posix()
        'runs/first'
    """
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise TypeError(f"`{argument}` must be a path, but {path!r} was given.") from error
    if not text:
        raise ValueError(f"`{argument}` is empty; give the path of a local file or folder, such as 'records'.")
    if URL.match(text):
        raise ValueError(
            f"`{argument}` is {text!r}, but only local paths are supported, because a remote store cannot replace "
            "a folder at once; give a local path, and copy it when it is complete."
        )
    return Path(text).expanduser()


def check_can_be_written(argument: str, folder: Path) -> None:
    """Check that a folder can be made, or be written to if it exists.

    Args:
        argument: The argument's name, for the error.
        folder: The folder.

    Raises:
        ValueError: If a file is in its place or in that of a parent, or if this process may not write there.
    """
    existing = Path(os.path.realpath(folder))
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(
            f"`{argument}` is {str(folder)!r}, but {str(existing)!r} is a file; give a folder, or a path where there "
            "is nothing yet."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"`{argument}` is {str(folder)!r}, but this process may not write to {str(existing)!r}; give another "
            "folder."
        )


def draft_path(target: Path) -> Path:
    """A new hidden path beside a target, from which a rename is atomic."""
    return target.with_name(DRAFT_PREFIX + secrets.token_hex(8))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, so that every reader sees the old content or all of the new one.

    A link keeps pointing to its file, which is replaced. What is no regular file, such as ``/dev/stdout``, is written
    to directly.

    Args:
        path: The file; missing folders are created.
        content: Text is encoded as UTF-8.

    Raises:
        OSError: If it cannot be written; the old content is then still there.
    """
    target = Path(os.path.realpath(path))
    encoded = content.encode("utf-8") if isinstance(content, str) else content
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():
        target.write_bytes(encoded)
        return
    draft = draft_path(target)
    try:
        with draft.open("xb") as draft_file:
            draft_file.write(encoded)
            draft_file.flush()
            os.fsync(draft_file.fileno())
        if target.exists():
            draft.chmod(stat.S_IMODE(target.stat().st_mode))
        draft.replace(target)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        raise_for_target(error, path)
    remove_old_drafts(target.parent)


def raise_for_target(error: BaseException, target: Path) -> None:
    """Raise an error that happened to a draft, with the name of the file or folder that it was to become."""
    if isinstance(error, OSError) and error.errno is not None:
        raise OSError(error.errno, f"{os.strerror(error.errno)}; nothing was written to", str(target)) from error
    raise error


def remove_old_drafts(folder: Path) -> None:
    """Remove the drafts in a folder that processes left when they were killed."""
    for draft in folder.glob(f"{DRAFT_PREFIX}*"):
        try:
            if time.time() - draft.lstat().st_mtime < SECONDS_OF_A_DRAFT:
                continue
            if draft.is_dir() and not draft.is_symlink():
                shutil.rmtree(draft)
            else:
                draft.unlink()
        except OSError:  # another process removed it, or it belongs to another user
            continue


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: If it holds something else, such as nothing.

    Examples:
        >>> read_json_object(Path(os.devnull))
        Traceback (most recent call last):
        ...
        ValueError: /dev/null is damaged: it is empty.
    """
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is damaged: it is empty.")
    return parse_json_object(content, str(path))


def parse_json_object(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object in some bytes.

    Args:
        content: The bytes.
        name: What holds them, for the error.

    Raises:
        ValueError: If they are no JSON object.

    Examples:
        >>> parse_json_object(b'{"a": 1}', "file")
        {'a': 1}
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is damaged: it holds {type(value).__name__} in place of an object.")
    return value
