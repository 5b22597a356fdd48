"""Records of the paper's protocol on disk: one ``.npz`` file, which numpy reads without pickle.

Its entry ``header`` is JSON: the version of the format, and all of a record that is no array. The arrays of question
``i`` are named ``q{i}/{name}``, those of its path ``j`` ``q{i}/p{j}/{name}``.
"""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.analysis.paper.prefix_tree import PrefixTree
from odp_callbacks.analysis.paper.records import PREDICTORS, PaperRecord, PathRecord, QuestionRecord
from odp_callbacks.files import local_path, write_atomically
from odp_callbacks.storage.manifest import DamagedRecordsError

VERSION = 1
HEADER = "header"
TREE = ("own", "shared", "next_token", "success", "forced_depth", "branch", "count")
PATH = ("depth", "token", "student", "teachers")
DAMAGE = (
    zipfile.BadZipFile, zlib.error, ValueError, LookupError, TypeError, EOFError, NotImplementedError, TokenError
)  # fmt: skip
"""What numpy and zipfile raise for a file that is not what was written."""
PLAIN = ("teachers", "settings", "deviations", "unpublished", "left_out", "generated_tokens", "targeted_rollouts")


def save_paper_record(record: PaperRecord, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a record to a file, either completely or not at all.

    Args:
        record: A measurement by the paper's protocol.
        path: The ``.npz`` file.
        overwrite: Replace the file if it exists.

    Returns:
        The file.

    Raises:
        FileExistsError: If the file exists and ``overwrite`` is False.
        OSError: If it cannot be written. What was there is then still there.
    """
    target = local_path("path", path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"`path` exists: {target}. Give another one, or `overwrite=True`.")
    header: dict[str, Any] = {name: getattr(record, name) for name in (*PLAIN, "stage_seconds")}
    header["version"], header["questions"] = VERSION, []
    arrays: dict[str, NDArray[Any]] = {}
    for number, question in enumerate(record.questions):
        arrays.update({f"q{number}/{name}": getattr(question.tree, name) for name in TREE})
        paths = []
        for place, of_path in enumerate(question.paths):
            prefix = f"q{number}/p{place}"
            arrays.update({f"{prefix}/{name}": getattr(of_path, name) for name in PATH})
            arrays.update({f"{prefix}/{name}": of_path.predictors[name] for name in PREDICTORS})
            arrays[f"{prefix}/tokens"] = np.array(question.tree.paths[place], dtype=np.int64)
            paths.append({"text": of_path.text, "correct": bool(of_path.correct), "enriched": list(of_path.enriched)})
        header["questions"].append(
            {"id": question.id, "prompt": question.prompt, "pass_rate": question.pass_rate, "paths": paths}
        )
    content = io.BytesIO()
    arrays[HEADER] = np.array(json.dumps(header, default=repr))
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]  # mypy takes an array for `allow_pickle`
    write_atomically(target, content.getvalue())
    return target


def load_paper_record(path: str | os.PathLike[str]) -> PaperRecord:
    """Read a record that :func:`save_paper_record` wrote.

    Args:
        path: The ``.npz`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedRecordsError: If it is not what was written, or was written by a newer version.
    """
    source = local_path("path", path)
    try:
        with np.load(io.BytesIO(source.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays[HEADER][()]))
        if header["version"] != VERSION:
            raise DamagedRecordsError(
                f"{source} has version {header['version']} of the format, but version {VERSION} is read; use the "
                "version of odp-callbacks that wrote it."
            )
        questions = tuple(_question(number, entry, arrays) for number, entry in enumerate(header["questions"]))
    except DAMAGE as error:
        if isinstance(error, DamagedRecordsError):
            raise
        raise DamagedRecordsError(f"{source} is damaged: it is no record of the paper's protocol ({error}).") from error
    plain = {name: header[name] for name in PLAIN}
    for name in ("teachers", "deviations", "unpublished"):
        plain[name] = tuple(plain[name])
    return PaperRecord(questions=questions, stage_seconds=header["stage_seconds"], **plain)


def _question(number: int, entry: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> QuestionRecord:
    """The record of a question from its part of the header and its arrays."""
    prefixes = [f"q{number}/p{place}" for place in range(len(entry["paths"]))]
    tree = PrefixTree(
        paths=tuple(tuple(arrays[f"{prefix}/tokens"].tolist()) for prefix in prefixes),
        **{name: arrays[f"q{number}/{name}"] for name in TREE},
    )
    paths = tuple(
        PathRecord(
            text=of_path["text"],
            correct=of_path["correct"],
            enriched=tuple(of_path["enriched"]),
            predictors={name: arrays[f"{prefix}/{name}"] for name in PREDICTORS},
            **{name: arrays[f"{prefix}/{name}"] for name in PATH},
        )
        for prefix, of_path in zip(prefixes, entry["paths"], strict=True)
    )
    return QuestionRecord(entry["id"], entry["prompt"], entry["pass_rate"], tree, paths)
