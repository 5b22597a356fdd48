"""``odp-callbacks compare``: which gain it compares."""

from pathlib import Path

import pytest

from odp_callbacks.analysis.summaries import summarise
from odp_callbacks.cli.compare import compare_reports, differences_table
from odp_callbacks.cli.main import main
from tests.helpers.records import MakeReport, split
from tests.helpers.updates import update_only, with_update


def test_update_gains_are_compared_if_both_reports_have_them(make_report: MakeReport) -> None:
    first = with_update(make_report(split), lambda correct: (0.6, -0.4), noise=0.01)
    second = update_only(make_report(split), lambda correct: (0.1, -0.4), noise=0.01, seed=1)
    differences = compare_reports(first, second)
    gains = [
        {(summary.teacher, summary.split): summary.figures["update_gain"].value for summary in summarise(report)}
        for report in (first, second)
    ]
    for row in differences:
        assert row.figure == "update_gain"
        before, after = (of_report[row.teacher, row.rollouts] for of_report in gains)
        assert (row.first, row.second, row.difference) == (before, after, after - before)
    assert {(row.teacher, row.verdict) for row in differences} == {("near", "first higher"), ("far", "cannot tell")}
    assert differences_table(differences).title == "Update gain, second less first"


def test_predicted_gains_are_compared_otherwise(make_report: MakeReport) -> None:
    with_both = with_update(make_report(split), lambda correct: (0.6, -0.4))
    assert {row.figure for row in compare_reports(with_both, make_report(split))} == {"predicted_gain"}
    with pytest.raises(ValueError, match="`first` and `second` have no gain in common"):
        compare_reports(make_report(split), update_only(make_report(split), lambda correct: (0.6, -0.4)))


def test_saved_updates_are_reported_and_compared(
    make_report: MakeReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        str(update_only(make_report(split), lambda correct: (0.6, -0.4), seed=seed).save(tmp_path / str(seed)))
        for seed in range(2)
    ]
    assert main(["compare", *folders]) == 0
    assert "Update gain, second less first" in capsys.readouterr().out
    assert main(["report", *folders, "--output", str(tmp_path / "report.html")]) == 0
    out = capsys.readouterr().out
    assert "“near” measurably helps" in " ".join(out.split())
    assert out.index("update") < out.index("bution")
    assert "Over the course of training" in (tmp_path / "report.html").read_text("utf-8")
