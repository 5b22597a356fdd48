"""The HTML report as a file: what it says, how large it is, and that text stays text."""

import json
import re
from base64 import b64decode
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odp_callbacks import Teacher, diagnose
from odp_callbacks.analysis.advice import advise
from odp_callbacks.analysis.evidence import gather
from odp_callbacks.analysis.run_curve import RUN_CURVE, curve_setting
from odp_callbacks.analysis.summaries import Analysis, summarise
from odp_callbacks.records import Floats
from odp_callbacks.visualization.html_report import write_report
from odp_callbacks.visualization.html_report.data import page_data, success_with_interval
from odp_callbacks.visualization.html_report.page import describe_estimate, significant_token_counts
from odp_callbacks.visualization.pictures import pictures
from odp_callbacks.visualization.report_text import table_text
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.records import HOSTILE, MakeReport, hostile, split
from tests.helpers.updates import update_only, with_texts, with_update


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def elements(text: str) -> Elements:
    parser = Elements()
    parser.feed(text)
    return parser


def elements_text(text: str) -> str:
    """The page without its style, script and data."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def embedded_data(text: str) -> Any:
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert script is not None
    return json.loads(script[1])


def test_whatever_was_written_stays_text(make_report: MakeReport, tmp_path: Path) -> None:
    text = write_report(hostile(make_report), tmp_path / "<b> & report.html").read_text("utf-8")
    page = elements(text)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert not [value for name, value in page.attributes if name.startswith("on")]
    assert "\x1b" not in text
    assert "\x00" not in text
    data = embedded_data(text)
    assert data["rollouts"][0]["question"] == HOSTILE[0]
    assert max(len(piece) for piece in data["pieces"]["texts"]) <= 61
    assert data["rollouts"][0]["length"] == len(HOSTILE)
    assert "49" not in data["words"]["7"], "no template is rendered"


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
        assert describe_estimate(summary.figures["predicted_gain"]) in text
    data, evidence = page_data(Analysis(report)), gather(report.nodes, teachers=2)
    for node_index, node in enumerate(data["nodes"]):
        record = report.nodes[node_index]
        alignment, gain = np.array(node["alignment"], dtype=float), np.array(node["gain"], dtype=float)
        np.testing.assert_allclose(alignment, evidence.cosine[node_index], rtol=1e-3)
        np.testing.assert_allclose(gain, evidence.gain[node_index], rtol=1e-3)
        for branch, (mean, low, high, count) in enumerate(node["success"]):
            assert mean == pytest.approx(record.total[branch] / record.count[branch], rel=1e-3)
            assert low <= mean <= high
            assert count == (0 if record.exact[branch] else record.count[branch])


def test_the_confidence_level_reaches_every_interval_of_the_page(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split, noise=0.2, success=(0.1, 0.8))
    report = replace(
        report, nodes=tuple(replace(node, total=np.array([0.0, 4.0 - node.depth % 2])) for node in report.nodes)
    )
    texts = {
        confidence: write_report(report, tmp_path / "report.html", confidence=confidence).read_text("utf-8")
        for confidence in (0.8, 0.95)
    }
    lengths = {}
    for confidence, text in texts.items():
        assert f"{100 * confidence:g}% confidence intervals" in text
        assert "95%" not in text or confidence == 0.95
        data = embedded_data(text)
        assert data["level"] == f"{100 * confidence:g}%"
        table = re.findall(r"\(([+-][\d.]+) to ([+-][\d.]+)\)", text[: text.index("<h2>Where to distil")])
        lengths[confidence] = {
            "table": [float(high) - float(low) for low, high in table],
            "success": [high - low for node in data["nodes"] for _, low, high, _ in node["success"]],
        }
    for name, narrow in lengths[0.8].items():
        pairs = list(zip(narrow, lengths[0.95][name], strict=True))
        assert len(pairs) > 10
        assert all(short < long or short == long == 0 for short, long in pairs), name
        assert sum(narrow) < 0.9 * sum(lengths[0.95][name]), name


def test_significant_tokens_are_counted_on_either_side_of_0(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split, success=(0.0, 1.0))
    text = write_report(report, tmp_path / "report.html").read_text("utf-8")
    rows = re.findall(r"<tr><td>(\w*)</td><td><bdi>(\w+)</bdi></td>.*?>(\d+) · (\d+)</td></tr>", text)
    counts = {(teacher, int(towards), int(away)) for _, teacher, towards, away in rows}
    node_count = len(report.nodes)
    assert ("near", node_count, 0) in counts, "towards success on every token"
    assert ("far", node_count // 2, node_count // 2) in counts, "and away from it on correct rollouts"


def test_success_has_wilsons_interval(make_report: MakeReport) -> None:
    node = make_report(split).nodes[0]
    node = replace(node, count=np.array([10, 0]), total=np.array([3.0, 0.0]), exact=np.array([False, False]))
    # From scipy.stats.binomtest(3, 10).proportion_ci(method="wilson").
    np.testing.assert_allclose(success_with_interval(node, 0), [0.3, 0.10779, 0.60322, 10], rtol=1e-3)
    # From scipy.stats.binomtest(3, 10).proportion_ci(0.8, method="wilson").
    np.testing.assert_allclose(success_with_interval(node, 0, 0.8), [0.3, 0.15380, 0.50263, 10], rtol=1e-3)
    assert success_with_interval(node, 1) == [None, None, None, 0], "what was not measured is not 0"


@pytest.mark.slow
def test_ten_thousand_nodes_take_less_than_five_megabytes(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split, questions=500, depths=tuple(range(10)))
    assert len(report.nodes) == 10_000
    path = write_report(report, tmp_path / "report.html")
    assert path.stat().st_size < 5e6


def test_probes_of_a_run_are_shown_in_their_order(make_report: MakeReport, tmp_path: Path) -> None:
    reports = [(f"step {index}", make_report(split, seed=index)) for index in range(3)]
    text = write_report(reports, tmp_path / "report.html").read_text("utf-8")
    assert "Over the course of training" in text
    assert "step 1" in text
    trend = text[text.index("<h2>Over the course of training") :]
    assert trend.index("step 0") < trend.index("step 2")
    single = write_report(reports[0][1], tmp_path / "one.html").read_text("utf-8")
    assert "Over the course of training" not in single


def test_a_report_of_an_update_alone_opens_with_it(make_report: MakeReport, tmp_path: Path) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1))
    text = write_report(report, tmp_path / "report.html").read_text("utf-8")
    summaries, contrasts = Analysis(report).summaries(), Analysis(report).contrasts()
    assert {summary.split for summary in summaries} == {"all", "correct", "incorrect", "incorrect-correct"}
    opening = text[: text.index("<h2>Where the gain comes from")]
    for summary in [*summaries, *contrasts]:
        assert describe_estimate(summary.figures["update_gain"]) in opening, (summary.teacher, summary.split)
    assert opening.index('id="certainty"') < opening.index("<svg") < opening.index("near - far")
    headings = ("Where the gain comes from", "On which tokens", "All figures")
    places = [text.index(f"<h2>{heading}") for heading in headings]
    assert places == sorted(places)
    for absent in ("redicted gain", "continuations", "Alignment over depth", "Where to distil", "<h2>Questions</h2>"):
        assert absent not in elements_text(text), absent
    for figure in ("update_contribution", "update_alignment"):
        assert describe_estimate(summaries[0].figures[figure]) in text[text.index("<h2>All figures") :]


def influence_of(data: Any) -> tuple[Floats, Floats]:
    """Influences and half-widths ``(T, K)`` as the page's script reads them."""
    influence, teachers = data["influence"], len(data["teachers"])
    value, half = (
        influence["scale"] * np.frombuffer(b64decode(influence[name]), "<f2").astype(float).reshape(-1, teachers)
        for name in ("value", "half")
    )
    return value, half


def test_every_token_s_influence_is_in_the_page(make_report: MakeReport) -> None:
    report = update_only(make_report(split), lambda correct: (0.3, -0.2), noise=0.5)
    data, table = page_data(Analysis(report, 0.8)), report.tokens(0.8)
    value, half = influence_of(data)
    assert len(value) == len(table) == 12 * 8
    for index, teacher in enumerate(report.teachers):
        np.testing.assert_allclose(value[:, index], table[f"influence_{teacher}"], rtol=1e-3)
        low, high = table[f"influence_{teacher}_low"], table[f"influence_{teacher}_high"]
        np.testing.assert_allclose(half[:, index], (high - low) / 2, rtol=1e-3)
    assert data["influence"]["scale"] == pytest.approx(np.quantile(np.abs(value), 0.95), rel=1e-3)


def test_rounding_changes_no_significance(make_report: MakeReport) -> None:
    """Half-widths that are nearly as large as the influences, on either side."""
    report = update_only(make_report(split), lambda correct: (0.3, -0.2), noise=0.5)
    exact = Analysis(report).influence
    assert exact is not None
    generator = np.random.default_rng(0)
    half_width = np.abs(exact.value) * (1 + 1e-4 * generator.normal(size=exact.value.shape))
    analysis = Analysis(report)
    analysis.__dict__["influence"] = replace(exact, low=exact.value - half_width, high=exact.value + half_width)
    assert analysis.influence is not None
    value, half = influence_of(page_data(analysis))
    significant = analysis.influence.significant
    assert 0.2 < significant.mean() < 0.8
    np.testing.assert_array_equal(np.abs(value) > half, significant)


def test_every_token_s_text_is_in_the_page(make_report: MakeReport) -> None:
    report = with_texts(make_report(split), 7)
    data = page_data(Analysis(report))
    ids = np.frombuffer(b64decode(data["pieces"]["ids"]), "<u4")
    shown = [data["pieces"]["texts"][place] for place in ids]
    assert shown == [piece for rollout in report.rollouts for piece in rollout.pieces]
    assert len(data["pieces"]["texts"]) == 7, "each text once"


def test_significant_tokens_are_counted_by_influence_where_it_was_measured(make_report: MakeReport) -> None:
    report = with_update(make_report(split), lambda correct: (0.3, -0.2), noise=0.3)
    counts, table = significant_token_counts(Analysis(report)), report.tokens()
    assert counts["correct", "near"] == (
        (table[table.reward == 1].influence_near_low > 0).sum(),
        (table[table.reward == 1].influence_near_high < 0).sum(),
    )
    assert counts["all", "far"] == ((table.influence_far_low > 0).sum(), (table.influence_far_high < 0).sum())


def test_an_update_without_influences_has_a_page(make_report: MakeReport, tmp_path: Path) -> None:
    report = update_only(make_report(split), lambda correct: (0.3, -0.2), influence=False)
    text = write_report(report, tmp_path / "report.html").read_text("utf-8")
    assert embedded_data(text)["influence"] is None
    assert "Where the gain comes from" not in text
    assert "Neither the influence of tokens nor any single token was measured." in text


def test_nodes_stay_beside_the_update(make_report: MakeReport, tmp_path: Path) -> None:
    report = with_update(make_report(split), lambda correct: (0.6, -0.4 if correct else 0.1))
    text = write_report(report, tmp_path / "report.html").read_text("utf-8")
    data = embedded_data(text)
    assert len(data["nodes"]) == len(report.nodes)
    assert data["influence"] is not None
    for words in ("Where the gain comes from", "Alignment over depth", "Where to distil", "influence of every token"):
        assert words in text
    for summary in summarise(report):
        for figure in ("update_gain", "predicted_gain"):
            assert describe_estimate(summary.figures[figure]) in text[text.index("<h2>All figures") :]


def test_fifty_thousand_tokens_take_less_than_five_megabytes(make_report: MakeReport, tmp_path: Path) -> None:
    names = ("near", "far", "answer", "base")
    short = make_report(lambda correct, depth: (0.1,) * 4, questions=50, teachers=names, depths=(0,))
    report = update_only(with_texts(short, 500), lambda correct: (0.3, -0.2, 0.1, 0.0))
    assert len(report.tokens()) == 50_000
    assert write_report(report, tmp_path / "report.html").stat().st_size < 2.5e6


def test_the_page_begins_with_what_to_do_next_and_how_sure_that_is(make_report: MakeReport, tmp_path: Path) -> None:
    report = update_only(make_report(split), lambda correct: (0.6, -0.3))
    page = write_report(report, tmp_path / "report.html").read_text("utf-8")
    text, advice = unescape(re.sub("</?strong>", "", page)), advise(Analysis(report))
    places = [text.index(part) for part in (advice.sentence, advice.certainty, "<table")]
    assert places == sorted(places)
    assert report.ranking().answer not in text, "it would say the same again"
    assert f"Next: {advice.sentence} How sure: {advice.certainty}" in " ".join(table_text(Analysis(report)).split())


def test_the_recommended_teacher_is_shown_first(make_report: MakeReport, tmp_path: Path) -> None:
    report = update_only(make_report(split), lambda correct: (-0.3, 0.6))
    text = write_report(report, tmp_path / "report.html").read_text("utf-8")
    assert '<option value="1" selected>far</option>' in text
    assert text.count(" selected>") == 1


def test_no_reader_meets_a_nan(make_report: MakeReport, tmp_path: Path) -> None:
    of_nodes = make_report(split, questions=1)
    for number, report in enumerate(
        (
            of_nodes,
            with_update(of_nodes, lambda correct: (0.6, 0.0)),
            update_only(of_nodes, lambda correct: (0.1, -1.0)),
        )
    ):
        text = write_report(report, tmp_path / f"report{number}.html").read_text("utf-8")
        assert not re.search(r"\bnan\b", elements_text(text), re.IGNORECASE)
        assert "nan" not in table_text(Analysis(report)).lower()


def test_what_was_expected_of_a_run_stands_beside_what_was_realised(make_report: MakeReport, tmp_path: Path) -> None:
    points = [{"step": 1, "gain_sum": 0.1, "gain_sum_low": 0.0, "gain_sum_high": 0.2, "reward_change": 0.15}]
    reports = [
        (f"step {step}", replace(make_report(split, seed=step), settings={RUN_CURVE: curve_setting(step, of_step)}))
        for step, of_step in ((0, []), (2, points))
    ]
    text = write_report(reports, tmp_path / "report.html").read_text("utf-8")
    course = text[text.index('<section id="course">') :]
    for words in (
        "Predicted against realised",
        "expected: sum of step gains",
        "reward of a batch",
        "success of a probe",
    ):
        assert words in course
    alone = write_report([(name, replace(report, settings={})) for name, report in reports], tmp_path / "alone.html")
    assert "Predicted against realised" not in alone.read_text("utf-8")


def test_updates_of_a_run_are_drawn_over_its_probes(make_report: MakeReport, tmp_path: Path) -> None:
    reports = [
        (f"step {index}", update_only(make_report(split), lambda correct: (0.3, -0.2), seed=index)) for index in (0, 1)
    ]
    text = write_report(reports, tmp_path / "report.html").read_text("utf-8")
    trend = text[text.index("<h2>Over the course of training") :]
    assert "update gain</text>" in trend


def test_a_real_diagnosis_without_continuations_is_shown(tmp_path: Path) -> None:
    def reward(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
        return [float(right in completion.split()) for completion, right in zip(completions, answer, strict=True)]

    rows = [{"prompt": prompt, "answer": prompt[0]} for prompt in ("a b", "c", "b a d", "d c", "a")]
    teachers = {"answer": Teacher("{answer} {prompt}"), "base": "base"}
    report = diagnose(
        tiny().float(), word_tokenizer(), rows, reward, teachers, budget=0, rollouts_per_question=4, max_new_tokens=4
    )
    text = report.to_html(tmp_path / "report.html").read_text("utf-8")
    data = embedded_data(text)
    shown, _ = influence_of(data)
    expected = report.tokens()[["influence_answer", "influence_base"]]
    np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-6 * data["influence"]["scale"])
    assert len(shown) == sum(rollout["length"] for rollout in data["rollouts"])
    for summary in report.summary():
        assert describe_estimate(summary.figures["update_gain"]) in text
    drawn = [name for name, _ in pictures(Analysis(report))]
    of_gain = [f"gain/{name}" for name in ("all_teachers", "by_class_and_depth", "by_layer", "by_module")]
    assert drawn == [*of_gain, "rollout/correct", "rollout/incorrect"]
    assert "Contribution of each module" in text
    for part, estimates in Analysis(report).contributions():
        assert f"<bdi>{part}</bdi>" in text
        assert all(describe_estimate(estimate) in text for estimate in estimates)
    assert "Update gain" in table_text(Analysis(report))


def test_a_report_of_neither_update_nor_nodes_is_refused(make_report: MakeReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`reports` must hold a probe with an update or with nodes"):
        write_report(replace(make_report(split), nodes=()), tmp_path / "report.html")
