"""A record of the paper's protocol survives a file, and a damaged file is noticed."""

import struct
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from odp_callbacks.analysis.paper.scored_nodes import score_nodes
from odp_callbacks.storage import DamagedRecordsError
from odp_callbacks.storage.paper_records import load_paper_record, save_paper_record
from tests.helpers.paper import example_record


def assert_equal(one: object, other: object) -> None:
    if hasattr(one, "__dataclass_fields__"):
        for field in fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, tuple | list) and one and not isinstance(one[0], int | str):
        assert len(one) == len(other)
        for part, other_part in zip(one, other, strict=True):
            assert_equal(part, other_part)
    else:
        np.testing.assert_array_equal(one, other)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    record = example_record()
    path = save_paper_record(record, tmp_path / "folder" / "paper.npz")
    loaded = load_paper_record(path)
    assert_equal(record, loaded)
    np.testing.assert_array_equal(score_nodes(record).cosine, score_nodes(loaded).cosine)


def test_a_record_without_questions_is_saved(tmp_path: Path) -> None:
    record = replace(example_record(), questions=())
    assert load_paper_record(save_paper_record(record, tmp_path / "paper.npz")).questions == ()


def test_a_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = save_paper_record(example_record(), tmp_path / "paper.npz")
    with pytest.raises(FileExistsError, match="`path` exists"):
        save_paper_record(example_record(), path)
    save_paper_record(replace(example_record(), targeted_rollouts=7), path, overwrite=True)
    assert load_paper_record(path).targeted_rollouts == 7


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text", "other"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = save_paper_record(example_record(), tmp_path / "paper.npz")
    content = path.read_bytes()
    if damage == "other":
        np.savez(path, nothing=np.zeros(2))
    else:
        changed = bytearray(content)
        largest = max(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.compress_size)
        # In the middle of its data: some of the fields before them may be anything.
        name_length, extra_length = struct.unpack_from("<HH", content, largest.header_offset + 26)
        start = largest.header_offset + 30 + name_length + extra_length
        changed[start + largest.compress_size // 2] ^= 0xFF
        path.write_bytes({"cut": content[:1000], "changed": bytes(changed), "empty": b"", "text": b"{}"}[damage])
    with pytest.raises(DamagedRecordsError, match=r"paper\.npz is damaged"):
        load_paper_record(path)


def test_no_changed_byte_gives_another_record(tmp_path: Path) -> None:
    path = save_paper_record(example_record(), tmp_path / "paper.npz")
    content, expected, refused = path.read_bytes(), repr(load_paper_record(path)), 0
    places = range(0, len(content), 101)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0xFF
        path.write_bytes(bytes(changed))
        try:
            assert repr(load_paper_record(path)) == expected
        except DamagedRecordsError:
            refused += 1
    assert refused > len(places) / 2


def test_a_missing_file_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_paper_record(tmp_path / "paper.npz")
