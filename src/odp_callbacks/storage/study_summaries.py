"""Summaries of a study's cells on disk: JSON, one file for a cell, or one for all cells of a study."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from odp_callbacks.analysis.study.figures import CellSummary, FigureKey, StudyFigure
from odp_callbacks.files import local_path, write_atomically
from odp_callbacks.storage.manifest import DamagedRecordsError

VERSION = 1
DIGITS = 6
"""Significant digits that are kept: far more than intervals need, and a third of the size."""


def save_summaries(cells: Sequence[CellSummary], path: str | os.PathLike[str]) -> Path:
    """Write summaries to a file, which appears whole or not at all.

    Args:
        cells: Summaries of cells.
        path: The ``.json`` file; it is replaced if it exists.
    """
    target = local_path("path", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_as_json(cell), ensure_ascii=False) for cell in cells)
    write_atomically(target, f'{{"version": {VERSION}, "cells": [\n{lines}\n]}}\n')
    return target


def load_summaries(path: str | os.PathLike[str]) -> list[CellSummary]:
    """Read what :func:`save_summaries` wrote.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedRecordsError: If it is not what was written, or was written by a newer version.
    """
    source = local_path("path", path)
    content = source.read_bytes()
    try:
        stored = json.loads(content)
        version = stored["version"]
        if version == VERSION:
            return [_from_json(entry) for entry in stored["cells"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedRecordsError(f"{source} is damaged: it holds no summaries of a study ({error!r}).") from error
    raise DamagedRecordsError(
        f"{source} has version {version!r} of the format, but version {VERSION} is read; use the version of "
        "odp-callbacks that wrote it."
    )


def _as_json(cell: CellSummary) -> dict[str, Any]:
    """A cell as JSON values; questions are numbered, so that each name stands once."""
    questions = sorted({question for figure in cell.figures.values() for question in figure.left_out})
    number = {question: index for index, question in enumerate(questions)}
    figures = [
        [
            *key,
            _rounded(figure.value),
            [number[question] for question in figure.left_out],
            [_rounded(value) for value in figure.left_out.values()],
            dict(figure.informative),
        ]
        for key, figure in cell.figures.items()
    ]
    return {
        "student": cell.student,
        "task": cell.task,
        "measurement": cell.measurement,
        "teachers": list(cell.teachers),
        "questions": cell.questions,
        "facts": dict(cell.facts),
        "question_names": questions,
        "figures": figures,
    }


def _from_json(entry: dict[str, Any]) -> CellSummary:
    names = entry["question_names"]
    figures = {}
    for name, teacher, paths, value, places, values, informative in entry["figures"]:
        left_out = {names[place]: _number(one) for place, one in zip(places, values, strict=True)}
        figures[FigureKey(name, teacher, paths)] = StudyFigure(_number(value), left_out, informative)
    return CellSummary(
        entry["student"],
        entry["task"],
        entry["measurement"],
        tuple(entry["teachers"]),
        entry["questions"],
        figures,
        entry["facts"],
    )


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
