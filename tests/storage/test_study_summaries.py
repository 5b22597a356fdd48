"""Summaries of a study on disk."""

from pathlib import Path

import pytest

from odp_callbacks.analysis.study.figures import FigureKey
from odp_callbacks.storage import DamagedRecordsError
from odp_callbacks.storage.study_summaries import load_summaries, save_summaries
from tests.helpers.study import cell_of, normal_mean


def test_what_was_written_is_read(tmp_path: Path) -> None:
    cell = cell_of({FigureKey("cosine", "Self-1C", "correct"): normal_mean(0.1)})
    (loaded,) = load_summaries(save_summaries([cell], tmp_path / "a" / "summaries.json"))
    (key,) = cell.figures
    assert (loaded.student, loaded.task, loaded.teachers, loaded.facts) == ("small", "sums", cell.teachers, cell.facts)
    assert loaded.figures[key].value == pytest.approx(cell.figures[key].value, rel=1e-5)
    assert dict(loaded.figures[key].left_out) == pytest.approx(dict(cell.figures[key].left_out), rel=1e-5)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1, "cells": [{}]}', '{"version": 9}', "\x00"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "summaries.json"
    file.write_text(content)
    with pytest.raises(DamagedRecordsError, match=str(file)):
        load_summaries(file)
