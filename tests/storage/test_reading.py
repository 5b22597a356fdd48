"""Damaged records are refused with a sentence; none is read as other data, and none ends in a traceback."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odp_callbacks.storage import DamagedRecordsError, load, save, schema
from odp_callbacks.storage.manifest import write_manifest
from tests.helpers.faults import flip_bit, rewrite_metadata, rewrite_table, set_value
from tests.helpers.records import example_report

STORED_RECORDS = Path(__file__).parents[1] / "data" / "records"
FILES = ["nodes.parquet", "rollouts.parquet", "manifest.json", "preconditioned/nodes.parquet"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(example_report(), tmp_path / "record")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(name: str, folder: Path) -> None:
    """Without a checksum, 226 of 400 such files were read as other data."""
    path = folder / name
    original = path.read_bytes()
    for position in np.random.default_rng(0).choice(8 * len(original), 60, replace=False).tolist():
        flip_bit(path, position)
        with pytest.raises(ValueError, match="`folder`"):
            load(folder)
        path.write_bytes(original)
    load(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_was_cut_short_is_noticed(kept: int, name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedRecordsError, match="`folder` is damaged"):
        load(folder)


@pytest.mark.parametrize("name", [*FILES, "preconditioned"])
def test_a_file_that_is_gone_is_noticed(name: str, folder: Path) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DamagedRecordsError, match=r"`folder` is damaged: \S+ is missing"):
        load(folder)


def test_files_of_two_records_are_not_one(folder: Path, tmp_path: Path) -> None:
    other = save(replace(example_report(), continuations=25), tmp_path / "other")
    shutil.copy(other / "nodes.parquet", folder / "nodes.parquet")
    with pytest.raises(DamagedRecordsError, match=r"nodes\.parquet is not what was written"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_records_of_version_1_have_no_checksums_but_are_read_with_care(kept: int, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORED_RECORDS / "version-1", tmp_path / "record"))
    path = folder / "rollouts.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedRecordsError, match="is no complete Parquet file"):
        load(folder)
    path.unlink()
    with pytest.raises(DamagedRecordsError, match=r"rollouts\.parquet is missing"):
        load(folder)


def without(entry: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda metadata: {name: value for name, value in metadata.items() if name != entry}


@pytest.mark.parametrize(
    "entry", ["version", "teachers", "modules", "step", "settings", "token_text", "stage_seconds", "continuations"]
)
def test_metadata_without_an_entry_are_refused(entry: str, folder: Path) -> None:
    rewrite_metadata(folder, without(entry))
    with pytest.raises(DamagedRecordsError, match=f"lack `{entry}`"):
        load(folder)


@pytest.mark.parametrize("content", [[], "text", 3, None, b"", b"{", b"\xff", b"[" * 100_000])
def test_metadata_that_are_no_object_are_refused(content: object, folder: Path) -> None:
    rewrite_metadata(folder, lambda metadata: content)
    with pytest.raises(DamagedRecordsError, match=r"`folder` is damaged: the metadata of .*nodes\.parquet"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"teachers": "answer"},
        {"teachers": [1, 2]},
        {"teachers": ["answer"]},
        {"modules": ["layers.0.q_proj"]},
        {"modules": None},
        {"step": []},
        {"step": {"question": ["sum"], "correct": [True], "gram": [1.0]}},
        {"step": {"question": ["sum"], "correct": []}},
        {"token_text": {"one": "1"}},
        {"settings": None},
        {"continuations": "24"},
        {"stage_seconds": {"rollouts": None}},
    ],
)
def test_metadata_of_another_kind_are_refused(changes: dict[str, Any], folder: Path) -> None:
    rewrite_metadata(folder, lambda metadata: {**metadata, **changes})
    with pytest.raises(DamagedRecordsError, match="`folder` is damaged"):
        load(folder)


@pytest.mark.parametrize("version", [True, "2", None, 0, -1, 2.5])
def test_an_unknown_version_is_refused(version: object, folder: Path) -> None:
    rewrite_metadata(folder, lambda metadata: {**metadata, "version": version})
    with pytest.raises(ValueError, match="unknown version"):
        load(folder)


def test_records_of_a_newer_version_are_told_from_damaged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the newer version changed."""
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    folder = save(example_report(), tmp_path / "newer")
    monkeypatch.undo()
    (folder / "nodes.parquet").unlink()
    with pytest.raises(ValueError, match="install a newer one"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("nodes.parquet", "taken"),
        ("nodes.parquet", "gram"),
        ("rollouts.parquet", "pieces"),
        ("rollouts.parquet", "reward"),
    ],
)
def test_a_missing_column_is_named(name: str, column: str, folder: Path) -> None:
    rewrite_table(folder, name, lambda table: table.drop_columns([column]))
    with pytest.raises(DamagedRecordsError, match=rf"{name} has no column `{column}`"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("nodes.parquet", "rollout", 4),
        ("nodes.parquet", "rollout", -1),
        ("nodes.parquet", "taken", 3),
        ("nodes.parquet", "taken", -1),
        ("nodes.parquet", "depth", -1),
        ("nodes.parquet", "depth", None),
        ("nodes.parquet", "probability", [1.0]),
        ("nodes.parquet", "tokens", []),
        ("nodes.parquet", "tokens", None),
        ("nodes.parquet", "count", [1, None, 2]),
        ("nodes.parquet", "gram", [1.0]),
        ("nodes.parquet", "module_gram", [1.0] * 10),
        ("nodes.parquet", "teacher_tail", [0.5]),
        ("rollouts.parquet", "reward", None),
        ("rollouts.parquet", "pieces", None),
    ],
)
def test_a_row_that_cannot_be_is_refused(name: str, column: str, value: object, folder: Path) -> None:
    rewrite_table(folder, name, lambda table: set_value(table, column, 1, value))
    with pytest.raises(DamagedRecordsError, match=f"`{column}`"):
        load(folder)


def test_a_column_of_another_type_is_refused(folder: Path) -> None:
    rewrite_table(folder, "nodes.parquet", lambda table: table.set_column(0, "rollout", table["question"]))
    with pytest.raises(DamagedRecordsError, match="a column of another type"):
        load(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "preconditioned/../../secret"])
def test_a_manifest_does_not_reach_outside_its_folder(name: str, folder: Path) -> None:
    text = (folder / "manifest.json").read_text().replace("preconditioned/nodes.parquet", name)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedRecordsError, match="does not list its files"):
        load(folder)


def test_what_a_user_adds_to_a_folder_does_not_matter(folder: Path) -> None:
    (folder / "notes.txt").write_text("looks good")
    assert load(folder).continuations == 24


def test_further_files_of_a_record_are_covered(folder: Path) -> None:
    (folder / "more.npz").write_bytes(b"data")
    write_manifest(folder)
    load(folder)
    (folder / "more.npz").write_bytes(b"date")
    with pytest.raises(DamagedRecordsError, match=r"more\.npz is not what was written"):
        load(folder)


def test_what_is_no_folder_of_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="holds no records"):
            load(path)
    for url in ("s3://bucket/records", "memory://records", "file:///records", "s3:/bucket"):
        with pytest.raises(ValueError, match="only local paths are supported"):
            load(url)
    with pytest.raises(TypeError, match="`folder` must be a path"):
        load(None)  # type: ignore[arg-type]
