"""What a report offers by itself: summary, ranking, files and tables."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from odp_callbacks import ProbeReport
from odp_callbacks.analysis.predictors import TOP_K_PREDICTORS
from odp_callbacks.analysis.ranking import rank
from odp_callbacks.analysis.summaries import (
    FIGURES,
    GEOMETRY_DEPENDENT,
    INCORRECT_MINUS_CORRECT,
    SPLITS,
    UPDATE_FIGURES,
    Analysis,
    summarise,
)
from tests.helpers.records import MakeReport, example_report, many_teachers, split


def test_summary_and_ranking_are_those_of_the_analysis(make_report: MakeReport) -> None:
    report = make_report(split)
    assert repr(report.summary()) == repr(summarise(report)), "NaN differs from itself, its name does not"
    assert {summary.split for summary in report.summary(0.9, by="depth")} == {"depth 0", "depth 2-3", "depth 4-7"}
    assert report.summary(0.9)[0].figures["predicted_gain"] == summarise(report, 0.9)[0].figures["predicted_gain"]
    assert report.ranking().answer == rank(report).answer
    assert list(report.ranking(0.9).classes) == list(rank(report).classes)
    with pytest.raises(ValueError, match="`confidence`"):
        report.ranking(2)


def test_a_report_saves_and_loads_itself(tmp_path: Path) -> None:
    report = example_report()
    folder = report.save(tmp_path / "records")
    loaded = ProbeReport.load(folder)
    assert (loaded.teachers, loaded.rollouts, loaded.settings) == (report.teachers, report.rollouts, report.settings)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        report.save(folder)
    assert replace(report, teachers=("a", "b"), preconditioned=None).save(folder, overwrite=True) == folder
    assert ProbeReport.load(folder).teachers == ("a", "b")
    with pytest.raises(FileNotFoundError):
        ProbeReport.load(tmp_path / "nowhere")


def test_a_report_writes_its_page(tmp_path: Path, make_report: MakeReport) -> None:
    page = make_report(split).to_html(tmp_path / "page.html", title="Who helps?", confidence=0.9)
    assert page == tmp_path / "page.html"
    assert "Who helps?" in page.read_text("utf-8")


def test_the_table_has_one_row_for_each_figure() -> None:
    report = many_teachers(3)
    table = report.to_pandas()
    assert list(table.columns[:6]) == ["teacher", "split", "figure", "value", "low", "high"]
    further = table["figure"].str.startswith("correlation_") | (table["teacher"] == "student")
    assert table[further]["figure"].str.endswith(("_with_alignment", "_with_predicted_gain", "success")).all()
    table = table[~further]
    pairs = {f"teacher {first} - teacher {second}" for first, second in ((0, 1), (0, 2), (1, 2))}
    assert set(table["teacher"]) == {*report.teachers, *pairs}
    assert set(table["split"]) == {*SPLITS, INCORRECT_MINUS_CORRECT}
    figures = set(FIGURES) - {*UPDATE_FIGURES, *TOP_K_PREDICTORS}
    assert set(table["figure"]) == figures
    assert not table.duplicated(["teacher", "split", "figure"]).any()
    assert len(table) == len(figures) * (3 * 4 + 3 * 3)
    rows = table.set_index(["teacher", "split", "figure"])
    analysis = Analysis(report)
    for summary in [*analysis.summaries(), *analysis.contrasts()]:
        for figure, estimate in summary.figures.items():
            row = rows.loc[summary.teacher, summary.split, figure]
            np.testing.assert_equal(
                (row["value"], row["low"], row["high"]), (estimate.value, estimate.low, estimate.high)
            )
            assert (row["questions"], row["nodes"], row["note"]) == (
                estimate.questions,
                estimate.nodes,
                estimate.note,
            )


def test_the_table_holds_every_geometry() -> None:
    table = example_report().to_pandas()
    assert set(table["geometry"]) == {"euclidean", "adam"}
    assert set(table[table["geometry"] == "adam"]["figure"]) == set(GEOMETRY_DEPENDENT) - set(UPDATE_FIGURES)
    assert not table.duplicated(["teacher", "split", "figure", "geometry"]).any()


def test_without_pandas_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        example_report().to_pandas()


def test_records_alone_load_neither_pandas_nor_torch() -> None:
    code = (
        "import sys; from odp_callbacks import ProbeReport; "
        "print([name for name in ('torch', 'pandas', 'pyarrow', 'scipy', 'lightning') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
