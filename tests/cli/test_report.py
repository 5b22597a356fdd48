"""``odp-callbacks report``: which folders it finds, and how it names them."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from odp_callbacks.cli.main import main
from odp_callbacks.storage import save
from tests.helpers.command_line import diagnose_arguments, printed_json
from tests.helpers.faults import flip_bit
from tests.helpers.records import example_report


def test_records_of_one_name_are_told_apart_and_a_demo_s_folder_is_known(
    student_folder: str, dataset: str, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        assert main(diagnose_arguments(student_folder, dataset, tmp_path / name, questions=1)) == 0
    page = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(page)]) == 0
    text = page.read_text("utf-8")
    assert "Over the course of training" in text
    assert ">one<" in text
    assert ">two<" in text
    demo_records = tmp_path / "odp-demo" / "records"
    for name in ("step-00000000", "step-00000006"):
        shutil.copytree(tmp_path / "one" / "records", demo_records / name)
    assert main(["report", str(demo_records.parent), "--output", str(page), "--json"]) == 0
    assert "step-00000006" in page.read_text("utf-8")


def test_a_folder_without_records_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "there are no records" in capsys.readouterr().err


def test_drafts_that_a_kill_left_are_no_probes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were an extra first probe, or an exit with a bare path."""
    records, page = tmp_path / "records", tmp_path / "report.html"
    save(example_report(), records / "step-00000010")
    save(replace(example_report(), teachers=("older", "base")), records / ".step-00000002-kqz8f3")
    (records / ".step-00000005-abc").mkdir()
    (records / ".step-00000005-abc" / "nodes.parquet").write_bytes(b"PAR1")
    assert main(["report", str(records), "--output", str(page), "--json"]) == 0
    assert {ranked["teacher"] for ranked in printed_json(capsys)["classes"]["all"]} == {"answer", "base"}
    assert "Over the course of training" not in page.read_text("utf-8")


def test_a_damaged_record_is_named_and_the_old_report_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = save(example_report(), tmp_path / "record"), tmp_path / "report.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    before = page.read_text("utf-8")
    flip_bit(folder / "nodes.parquet", 4000)
    assert main(["report", str(folder), "--output", str(page)]) == 2
    assert f"`folder` is damaged: nodes.parquet is not what was written to {folder}" in capsys.readouterr().err
    assert page.read_text("utf-8") == before
    assert main(["compare", str(folder), str(folder)]) == 2


@pytest.mark.parametrize("rollouts", [True, False])
def test_an_empty_record_is_refused_with_a_sentence(
    rollouts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`compare` ended with "KeyError: 'pop from an empty set'"."""
    full = example_report()
    empty = replace(full, nodes=(), step=None, updates=(), preconditioned=None)
    save(full, tmp_path / "full")
    save(empty if rollouts else replace(empty, rollouts=()), tmp_path / "empty")
    for first, second in (("empty", "full"), ("full", "empty")):
        assert main(["compare", str(tmp_path / first), str(tmp_path / second)]) == 2
        argument = "first" if first == "empty" else "second"
        assert f"`{argument}` is '{tmp_path / 'empty'}', a probe that measured neither" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "empty"), "--output", str(tmp_path / "report.html")]) == 2
    assert "there is nothing to show" in capsys.readouterr().err
    assert replace(empty, rollouts=()).ranking().answer


@pytest.mark.parametrize("url", ["s3://bucket/x", "memory://x"])
def test_urls_are_refused(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(example_report(), tmp_path / "record")
    for arguments in (["report", url], ["compare", url, str(folder)], ["report", str(folder), "--output", url]):
        assert main(arguments) == 2
        assert f"'{url}', but only local paths are supported" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(example_report(), tmp_path / "record")
    (tmp_path / "file").write_text("")
    assert main(["report", str(folder), "--output", str(tmp_path / "file" / "report.html")]) == 2
    assert "file' is a file; give a folder" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err


def test_a_full_disk_costs_no_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = save(example_report(), tmp_path / "record"), tmp_path / "report.html"
    page.write_text("old")

    def fill_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_disk)
    assert main(["report", str(folder), "--output", str(page)]) == 1
    assert "No space left on device; nothing was written to" in capsys.readouterr().err
    assert page.read_text() == "old"
