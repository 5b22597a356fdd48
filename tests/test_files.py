"""Files that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from odp_callbacks.files import check_can_be_written, local_path, read_json_object, write_atomically


def test_a_file_is_replaced_and_no_draft_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "settings.json"
    for content in ("{}", b'{"a": "\xc3\xbc"}'):
        write_atomically(path, content)
    assert read_json_object(path) == {"a": "ü"}
    assert [file.name for file in path.parent.iterdir()] == ["settings.json"]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_atomically(path, "old")

    def fill_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(OSError, match=r"No space left on device; nothing was written to: .*report\.html'"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_links_devices_and_permissions_are_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    write_atomically(Path(os.devnull), "gone")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("path", ["s3://b/x", "gs://b", "memory://x", "simplecache::s3://b/x", "file:/x", "hf://d/x"])
def test_urls_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=rf"`records` is '{path}', but only local paths are supported"):
        local_path("records", path)


@pytest.mark.parametrize("path", ["records", "C:\\runs", "C:/runs", "a:b", "/x/y:z", "./s3:/x"])
def test_local_paths_are_taken(path: str) -> None:
    assert local_path("records", path) == Path(path)


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(ValueError, match="`records` is empty"):
        local_path("records", "")
    with pytest.raises(TypeError, match="`records` must be a path, but 3 was given"):
        local_path("records", 3)  # type: ignore[arg-type]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ValueError, match=r"`records` is .*file' is a file"):
            check_can_be_written("records", path)
    check_can_be_written("records", tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"this process may not write to"):
        check_can_be_written("records", tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"{", "not JSON"),
        (b"[]", "it holds list"),
        (b"\xff", "JSON"),
    ],
)
def test_json_is_read_with_care(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"settings.json is damaged: .*{message}"):
        read_json_object(path)
