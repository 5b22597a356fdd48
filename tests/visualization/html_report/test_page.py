"""The report as a file: what it says, how large it is, and that text stays text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.summaries import Analysis, summarise
from odp_callbacks.visualization import plots
from odp_callbacks.visualization.html_report import write_report
from odp_callbacks.visualization.html_report.data import page_data, success
from odp_callbacks.visualization.html_report.page import show
from tests.helpers.records import HOSTILE, MakeReport, hostile, split


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def elements(text: str) -> Elements:
    found = Elements()
    found.feed(text)
    return found


def embedded(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_whatever_was_written_stays_text(make_report: MakeReport, tmp_path: Path) -> None:
    text = write_report(hostile(make_report), tmp_path / "<b> & report.html").read_text("utf-8")
    found = elements(text)
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert not [value for name, value in found.attributes if name.startswith("on")]
    assert "\x1b" not in text
    assert "\x00" not in text
    data = embedded(text)
    assert data["rollouts"][0]["question"] == HOSTILE[0]
    assert max(len(piece) for r in data["rollouts"] for piece in r["pieces"]) <= 61
    assert "49" not in data["words"]["7"], "no template is run"


def test_nothing_is_loaded_from_elsewhere(make_report: MakeReport, tmp_path: Path) -> None:
    text = write_report(make_report(split), tmp_path / "report.html").read_text("utf-8")
    assert "default-src 'none'" in text
    for name, value in elements(text).attributes:
        if name in {"src", "href", "xlink:href", "srcset", "action"}:
            assert value is not None
            assert value.startswith(("#", "data:,")), (name, value)
    assert "@import" not in text
    assert "url(http" not in text


def test_the_page_s_numbers_are_the_library_s(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split)
    text = write_report(report, tmp_path / "report.html").read_text("utf-8")
    for summary in summarise(report):
        assert show(summary.figures["predicted_gain"]) in text
    data, evidence = page_data(Analysis(report)), gather(report.nodes, teachers=2)
    for n, node in enumerate(data["nodes"]):
        np.testing.assert_allclose(np.array(node["a"], dtype=float), evidence.cosine[n], rtol=1e-3)
        np.testing.assert_allclose(np.array(node["g"], dtype=float), evidence.gain[n], rtol=1e-3)
        for a, (mean, low, high, count) in enumerate(node["s"]):
            record = report.nodes[n]
            assert mean == pytest.approx(record.total[a] / record.count[a], rel=1e-3)
            assert low <= mean <= high
            assert count == (0 if record.exact[a] else record.count[a])


def test_sure_tokens_are_counted_for_and_against(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split, success=(0.0, 1.0))
    text = write_report(report, tmp_path / "report.html").read_text("utf-8")
    rows = re.findall(r"<tr><td>(\w*)</td><td><bdi>(\w+)</bdi></td>.*?>(\d+) · (\d+)</td></tr>", text)
    found = {(teacher, int(a), int(b)) for _, teacher, a, b in rows}
    nodes = len(report.nodes)
    assert ("near", nodes, 0) in found, "towards success on every token"
    assert ("far", nodes // 2, nodes // 2) in found, "and against it on correct rollouts"


def test_success_has_wilsons_interval(make_report: MakeReport) -> None:
    node = make_report(split).nodes[0]
    some = replace(node, count=np.array([10, 0]), total=np.array([3.0, 0.0]), exact=np.array([False, False]))
    # Of scipy.stats.binomtest(3, 10).proportion_ci(method="wilson").
    np.testing.assert_allclose(success(some, 0), [0.3, 0.10779, 0.60322, 10], rtol=1e-3)
    assert success(some, 1) == [None, None, None, 0], "what was not measured is not 0"


def test_ten_thousand_nodes_take_less_than_five_megabytes(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split, questions=500, depths=tuple(range(10)))
    assert len(report.nodes) == 10_000
    found = write_report(report, tmp_path / "report.html")
    assert found.stat().st_size < 5e6


def test_probes_of_a_run_are_shown_as_it_went(make_report: MakeReport, tmp_path: Path) -> None:
    several = [(f"step {i}", make_report(split, seed=i)) for i in range(3)]
    text = write_report(several, tmp_path / "report.html").read_text("utf-8")
    assert "As training went" in text
    assert "step 1" in text
    trend = text[text.index("As training went") :]
    low, high = make_report(lambda c, d: (0.1, 0.1), noise=0.0), make_report(lambda c, d: (0.9, 0.9), noise=0.0)
    figure = plots.over_steps([("same", low), ("same", high)], 0.95)
    first, second, *_ = figure.axes[0].containers
    assert first[0].get_ydata() < second[0].get_ydata(), "two probes of one name are still two"
    assert trend.index("step 0") < trend.index("step 2")
    assert "As training went" not in write_report(several[0][1], tmp_path / "one.html").read_text("utf-8")


def test_the_free_mode_has_a_report_too(make_report: MakeReport, tmp_path: Path) -> None:
    text = write_report(replace(make_report(split), free=True), tmp_path / "report.html").read_text("utf-8")
    assert "Where to distil" not in text
    assert "undefined" in text


def test_nothing_to_show_is_said(make_report: MakeReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`reports` must hold a probe with nodes"):
        write_report(replace(make_report(split), nodes=()), tmp_path / "report.html")
