"""``odp-callbacks report``: which folders it finds, and how it names them."""

import shutil
from pathlib import Path

import pytest

from odp_callbacks.cli.main import main
from tests.helpers.command_line import diagnose_arguments


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
