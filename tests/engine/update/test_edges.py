"""A diagnosis by update gain where there is little to tell: a figure, or one sentence why not, and no exception."""

import math
from pathlib import Path

import pytest

from odp_callbacks import diagnose
from odp_callbacks.analysis.ranking import rank
from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization.report_text import table_text
from tests.helpers.edges import EDGES
from tests.helpers.models import word_tokenizer

ROWS = [
    {"prompt": prompt, "answer": answer}
    for prompt, answer in zip(("a b", "c", "b a d", "d c", "a", "b", "c d", "d a b"), "abcdabcd", strict=True)
]


@pytest.mark.parametrize("name", list(EDGES))
def test_a_diagnosis_has_a_figure_or_says_why_not(name: str, tmp_path: Path) -> None:
    edge = EDGES[name]
    rows, expected = ROWS[: edge.questions], edge.missing
    report = diagnose(edge.student(), word_tokenizer(), rows, **edge.settings())
    table = report.to_pandas()
    gains = table[(table.figure == "update_gain") & (table.split == "all")].set_index("teacher")
    answer = rank(report).answer
    assert expected in answer
    if edge.ends_at_once:
        assert 0 < sum(not rollout.text for rollout in report.rollouts) < len(report.rollouts)
    assert not answer.count("\n")
    for teacher in report.teachers:
        gain = gains.loc[teacher]
        assert math.isnan(gain.value) == (teacher in edge.without)
        assert (gain.note != "") == math.isnan(gain.low)
        influence = report.tokens()[f"influence_{teacher}"]
        assert influence.isna().all() if teacher in edge.without else influence.notna().all()
        parts = table[(table.figure == "contribution") & (table.teacher == teacher)]
        assert not (parts.value == 0).all(), "what does not exist is not 0"
        assert (parts.note[parts.value.isna()] != "").all()
    page = report.to_html(tmp_path / "report.html").read_text("utf-8")
    assert answer.split(".")[0] in page.replace("</strong>", "")  # the first clause is bold
    assert "nan" not in page.split('id="data"')[0].lower().replace("nano", "")
    assert "no estimate" in table_text(Analysis(report)) or not edge.without
