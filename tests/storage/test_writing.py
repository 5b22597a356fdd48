"""A record is replaced at once or not at all, whatever ends the writing."""

import errno
import os
import stat
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from odp_callbacks.files import DRAFT_PREFIX, SECONDS_OF_A_DRAFT
from odp_callbacks.storage import folders, load, record_folders, save
from tests.helpers.records import example_report

FIRST, SECOND = (replace(example_report(), continuations=count) for count in (1, 2))
ROOT = Path(__file__).parents[2]
KILL_AT_EVERY_MOMENT = """
    import os, signal, sys
    from pathlib import Path
    from dataclasses import replace
    from odp_callbacks.storage import folders, save
    from tests.helpers.records import example_report

    first, second = (replace(example_report(), continuations=count) for count in (1, 2))

    if sys.argv[2] == "two-steps":
        folders.exchange = lambda first, second: False
    for moment in range(1000):
        folder = Path(sys.argv[1]) / str(moment)
        save(first, folder / "record")
        child = os.fork()
        if not child:
            events = iter(range(1000))

            def end(event, arguments):
                changes = event.split(".")[0] in ("os", "shutil") or (event == "open" and str(folder) in str(arguments))
                if changes and next(events) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(end)
            save(second, folder / "record", overwrite=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
"""
"""Ends the process before each of the system's functions that overwriting calls, one after another."""


@pytest.mark.parametrize("way", ["exchange", pytest.param("two-steps", marks=pytest.mark.slow)])
def test_whenever_overwriting_is_killed_one_of_the_two_records_is_there(way: str, tmp_path: Path) -> None:
    """24 of 100 records were gone, and 2 were half deleted."""
    command = [sys.executable, "-c", textwrap.dedent(KILL_AT_EVERY_MOMENT), str(tmp_path), way]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    moments = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    assert len(moments) > 15
    found = []
    for moment in moments:
        (record,) = record_folders(moment)
        assert record == moment / "record"
        found.append(load(record).continuations)
        save(SECOND, record, overwrite=True)
        assert load(record).continuations == 2
        assert [path.name for path in record_folders(moment)] == ["record"]
    assert found[0] == 1
    assert found[-1] == 2
    assert found == sorted(found)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_folders_and_files_have_the_user_s_permissions(mask: int, tmp_path: Path) -> None:
    """Folders came out with 0700, so that no colleague could read them."""
    previous_mask = os.umask(mask)
    try:
        folder = save(example_report(), tmp_path / "run" / "record")
    finally:
        os.umask(previous_mask)
    for path in (folder, folder / "preconditioned"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask
    for path in folder.glob("*.*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_permissions_that_a_user_changed_stay(tmp_path: Path) -> None:
    folder = save(FIRST, tmp_path / "record")
    folder.chmod(0o750)
    save(SECOND, folder, overwrite=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_drafts_are_no_records_and_are_removed_when_they_are_old(tmp_path: Path) -> None:
    save(FIRST, tmp_path / "step-00000001")
    save(FIRST, tmp_path / ".step-00000002-kqz8f3")
    draft = save(FIRST, tmp_path / f"{DRAFT_PREFIX}1")
    old_draft = save(FIRST, tmp_path / f"{DRAFT_PREFIX}2")
    assert [path.name for path in record_folders(tmp_path)] == ["step-00000001"]
    os.utime(old_draft, (0, draft.stat().st_mtime - SECONDS_OF_A_DRAFT - 1))
    save(FIRST, tmp_path / "step-00000003")
    assert draft.exists()
    assert not old_draft.exists()
    assert (tmp_path / ".step-00000002-kqz8f3").exists(), "it may be somebody's"


def test_numbers_in_names_are_compared_as_numbers(tmp_path: Path) -> None:
    names = ["epoch-2", "epoch-10", "epoch-100", "last"]
    for name in reversed(names):
        save(FIRST, tmp_path / name)
    assert [path.name for path in record_folders(tmp_path)] == names


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_full_disk_costs_no_old_record(written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(FIRST, tmp_path / "record")
    write_table = parquet.write_table
    tables: list[Any] = []

    def fill_disk(table: Any, file: Any, **options: Any) -> None:
        if len(tables) == written:
            file.write(b"PAR1")
            raise OSError(errno.ENOSPC, "No space left on device")
        tables.append(table)
        write_table(table, file, **options)

    monkeypatch.setattr(parquet, "write_table", fill_disk)
    with pytest.raises(OSError, match=r"No space left on device; nothing was written to: .*record'"):
        save(SECOND, folder, overwrite=True)
    assert load(folder).continuations == 1
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for overwrite in (True, False):
        with pytest.raises(FileExistsError, match="`folder` is a file"):
            save(FIRST, tmp_path / "file", overwrite=overwrite)
    with pytest.raises(OSError, match="nothing was written to"):
        save(FIRST, tmp_path / "file" / "record")
    assert (tmp_path / "file").read_text() == "mine"


def test_overwriting_removes_nothing_but_records(tmp_path: Path) -> None:
    """`save(report, ".", overwrite=True)` emptied the folder that one was in."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files than records"):
        save(FIRST, tmp_path, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert load(save(FIRST, tmp_path / "empty", overwrite=True)).continuations == 1
    assert (tmp_path / "thesis.tex").exists()


def test_a_linked_record_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "record"
    link.symlink_to(tmp_path / "disk" / "real")
    for report in (FIRST, SECOND):
        save(report, link, overwrite=True)
        assert link.is_symlink()
        assert load(tmp_path / "disk" / "real").continuations == load(link).continuations == report.continuations


@pytest.mark.parametrize("name", ["übung 夜 😀", "a" * 250, "-", "new\nline", b"\xff\xfe", "~x"])
def test_folders_may_have_any_name(name: str | bytes, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(name)
    save(FIRST, folder)
    save(SECOND, folder, overwrite=True)
    assert load(folder).continuations == 2
    assert record_folders(tmp_path) == [folder]


def test_a_folder_below_home_is_not_one_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save(FIRST, "~/record")
    assert load(tmp_path / "home" / "record").continuations == 1
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("url", ["s3://bucket/records", "memory://records", "gs://b", Path("s3://bucket/records")])
def test_a_url_is_no_local_folder(url: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder `s3:` came into being."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="only local paths are supported"):
        save(FIRST, url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_while_several_write_a_reader_always_finds_a_whole_record(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(folders, "exchange", lambda first, second: False)
    folder = save(FIRST, tmp_path / "record")
    writers_at_work = [True, True]
    errors: list[BaseException] = []

    def write(index: int) -> None:
        try:
            for _ in range(10):
                save((FIRST, SECOND)[index], folder, overwrite=True)
        except BaseException as error:
            errors.append(error)
        writers_at_work[index] = False

    # Two processes that cannot exchange folders may take each other's place; one writer cannot.
    writers = [threading.Thread(target=write, args=(index,)) for index in range(2 if can_exchange else 1)]
    writers_at_work[1] = can_exchange
    for writer in writers:
        writer.start()
    while any(writers_at_work):
        assert load(folder).continuations in (1, 2)
    for writer in writers:
        writer.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    """Records were written that could not be read: "cannot reshape array"."""
    report = example_report()
    misfit = replace(report.nodes[1], gram=report.nodes[1].gram[:1])
    with pytest.raises(ValueError, match="has a node 1 that does not fit"):
        save(replace(report, nodes=(report.nodes[0], misfit)), tmp_path / "record")
    assert not list(tmp_path.iterdir())
