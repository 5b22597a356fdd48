"""The HTML report in a real browser."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization.html_report import write_report
from tests.helpers.page_scripts import FILTER
from tests.helpers.records import HOSTILE, MakeReport, hostile, many_teachers, report_maker, split
from tests.helpers.updates import update_only, with_texts, with_update

pytestmark = pytest.mark.browser


def open_page(browser: Any, path: Path) -> None:
    browser.get(path.as_uri())
    assert not browser.get_log("browser"), "the console must stay empty"


def tokens(browser: Any, selector: str = "") -> list[Any]:
    elements: list[Any] = browser.find_elements(By.CSS_SELECTOR, f"#rollouts .token[data-depth]{selector}")
    return elements


def test_hover_filter_and_sort(browser: Any, make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split, success=(0.0, 1.0))
    nodes_by_module = tuple(
        replace(node, gram=np.concatenate([0.7 * node.gram, 0.3 * node.gram])) for node in report.nodes
    )
    report = replace(report, nodes=nodes_by_module, modules=("layers.0.q_proj", "layers.1.q_proj"))
    open_page(browser, write_report(report, tmp_path / "report.html"))
    assert browser.find_element(By.ID, "next").text.startswith("As far as single tokens tell, distil with “near”")
    assert "“near”" in browser.find_element(By.ID, "certainty").text
    assert len(tokens(browser)) == len(report.nodes)
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    panel = browser.find_element(By.ID, "panel")
    assert "Alignment by layer and module" in browser.find_element(By.TAG_NAME, "main").text
    for text in ("candidate", "near", "far", "pushed", "%"):
        assert text in panel.text
    tokens(browser)[0].send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tokens(browser)[1]
    assert f"Token {report.nodes[1].depth} " in panel.text

    assert len(browser.find_elements(By.CSS_SELECTOR, '#rollouts [tabindex="0"]')) == 1, "Tab stops once for all tokens"
    tokens(browser)[2].click()
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    assert f"Token {report.nodes[2].depth} " in panel.text, "pinned"
    tokens(browser)[2].click()
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    assert f"Token {report.nodes[0].depth} " in panel.text, "unpinned"

    tokens(browser)[1].send_keys(Keys.ENTER)
    ActionChains(browser).move_to_element(tokens(browser)[3]).perform()
    assert f"Token {report.nodes[1].depth} " in panel.text, "pinned by keyboard"
    tokens(browser)[1].send_keys(Keys.SPACE)

    Select(browser.find_element(By.ID, "correct")).select_by_value("0")
    assert len(browser.find_elements(By.CLASS_NAME, "rollout")) == sum(
        not rollout.correct for rollout in report.rollouts
    )
    start = browser.find_element(By.ID, "from")
    start.clear()
    start.send_keys("3")
    assert len(tokens(browser, ":not(.faded)")) == sum(not node.correct and node.depth >= 3 for node in report.nodes)
    Select(browser.find_element(By.ID, "correct")).select_by_value("")
    Select(browser.find_element(By.ID, "teacher")).select_by_value("1")
    Select(browser.find_element(By.ID, "sort")).select_by_value("harm")
    assert "· correct" in browser.find_element(By.CLASS_NAME, "rollout").text, "the far one harms correct rollouts"
    Select(browser.find_element(By.ID, "sort")).select_by_value("help")
    assert "· incorrect" in browser.find_element(By.CLASS_NAME, "rollout").text
    browser.find_element(By.ID, "significant").click()
    significant = Analysis(report).significant_tokens()[:, 1]
    rollouts = [
        node.rollout for node, chosen in zip(report.nodes, significant, strict=True) if chosen and node.depth >= 3
    ]
    assert len(rollouts) > 0
    expected_count = f"{len(rollouts)} measured tokens in {len(set(rollouts))} rollouts"
    assert browser.find_element(By.ID, "count").text == expected_count
    assert len(tokens(browser, ":not(.faded)")) == len(rollouts)
    start.clear()
    start.send_keys("999")
    assert browser.find_element(By.ID, "count").text == "0 measured tokens in 0 rollouts"
    assert not browser.find_elements(By.CLASS_NAME, "rollout")
    assert "No measured token" in panel.text
    assert not browser.get_log("browser")


def test_tokens_that_are_not_significant_are_only_framed(browser: Any, make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split)
    nodes = tuple(
        replace(node, total=np.array([2.0, 2.5])) if node_index % 2 else node
        for node_index, node in enumerate(report.nodes)
    )
    report = replace(report, nodes=nodes)
    significant = Analysis(report).significant_tokens()[:, 0]
    assert 0 < significant.sum() < len(significant)
    open_page(browser, write_report(report, tmp_path / "report.html"))
    for token, filled in zip(tokens(browser), significant, strict=True):
        assert ("significant" in token.get_attribute("class").split()) == filled
        assert (token.value_of_css_property("background-color") == "rgba(0, 0, 0, 0)") == (not filled)
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    low, high = Analysis(report).token_intervals()
    interval = f"({low[0, 0]:+.3f} to {high[0, 0]:+.3f})".replace("-", "\N{MINUS SIGN}")
    assert interval in browser.find_element(By.ID, "panel").text


def test_every_token_is_coloured_by_its_influence(browser: Any, make_report: MakeReport, tmp_path: Path) -> None:
    report = update_only(make_report(split), lambda correct: (0.4 if correct else 0.05, -0.3), noise=0.2)
    influence = Analysis(report).influence
    assert influence is not None
    open_page(browser, write_report(report, tmp_path / "report.html"))
    assert browser.find_element(By.ID, "count").text == "96 tokens in 12 rollouts"
    significant = influence.significant[:, 0]
    assert 0 < significant.sum() < len(significant)
    assert len(tokens(browser)) == len(significant)
    for token, filled, value in zip(tokens(browser)[:24], significant, influence.value[:, 0], strict=False):
        classes = token.get_attribute("class").split()
        assert ("significant" in classes, "slight" in classes) == (filled, not filled)
        red, _, blue = (int(part) for part in re.findall(r"\d+", token.value_of_css_property("border-left-color"))[:3])
        if not filled and abs(value) > influence.scale / 2:
            assert (blue > red) == (value > 0), "purple helps"
    second = tokens(browser)[1]
    ActionChains(browser).move_to_element(second).perform()
    panel = browser.find_element(By.ID, "panel").text
    for text in ("near", "far", "95% interval", "Token 1 of the response"):
        assert text in panel
    row = browser.find_elements(By.CSS_SELECTOR, "#panel tr")[1].text
    shown = [float(number) for number in re.findall(r"[+-][\d.e-]+", row.replace("\N{MINUS SIGN}", "-"))]
    expected = [float(ends[1, 0]) for ends in (influence.value, influence.low, influence.high)]
    assert shown == pytest.approx(expected, rel=0.01)
    Select(browser.find_element(By.ID, "teacher")).select_by_value("1")
    browser.find_element(By.ID, "significant").click()
    count = int(influence.significant[:, 1].sum())
    assert browser.find_element(By.ID, "count").text.startswith(f"{count} tokens in ")
    assert len(tokens(browser, ":not(.faded)")) == count
    assert not browser.find_element(By.ID, "measure").is_displayed(), "there are no nodes to colour by"
    assert not browser.get_log("browser")


def test_measured_tokens_show_their_candidates_below_the_influence(
    browser: Any, make_report: MakeReport, tmp_path: Path
) -> None:
    report = with_update(make_report(split), lambda correct: (0.4, -0.3))
    open_page(browser, write_report(report, tmp_path / "report.html"))
    assert len(tokens(browser)) == 96
    assert len(tokens(browser, ".node")) == len(report.nodes)
    panel = browser.find_element(By.ID, "panel")
    ActionChains(browser).move_to_element(tokens(browser, ".node")[0]).perform()
    assert panel.text.index("influence") < panel.text.index("alignment") < panel.text.index("candidate")
    ActionChains(browser).move_to_element(tokens(browser, ":not(.node)")[0]).perform()
    assert "Not measured with continuations" in panel.text
    assert "candidate" not in panel.text
    Select(browser.find_element(By.ID, "measure")).select_by_value("alignment")
    assert len(tokens(browser)) == len(report.nodes)
    assert [legend.is_displayed() for legend in browser.find_elements(By.CLASS_NAME, "legend")] == [False, True]


def test_the_alignment_of_measured_tokens_lies_on_top_of_the_influence(
    browser: Any, make_report: MakeReport, tmp_path: Path
) -> None:
    report = with_update(make_report(split, success=(0.0, 1.0)), lambda correct: (0.4, -0.3))
    quiet = replace(report.nodes[1], total=np.array([2.0, 2.5]))
    report = replace(report, nodes=(report.nodes[0], quiet, *report.nodes[2:]))
    open_page(browser, write_report(report, tmp_path / "report.html"))
    Select(browser.find_element(By.ID, "teacher")).select_by_value("1")
    significant, alignment = Analysis(report).significant_tokens()[:, 1], Analysis(report).token_alignment()[:, 1]
    assert not significant[1]
    drawn = tokens(browser, ".node")
    for token, is_significant, value in zip(drawn, significant, alignment, strict=True):
        classes = token.get_attribute("class").split()
        assert ("towards" in classes, "away" in classes) == (value > 0, value < 0)
        assert ("sure" in classes) == is_significant
    shadows = [token.value_of_css_property("box-shadow") for token in drawn[:2]]
    assert shadows[0] != shadows[1], "significant ones are thicker"
    assert f"alignment {alignment[0]:+.3f}".replace("-", "\N{MINUS SIGN}") in drawn[0].get_attribute("aria-label")


SCROLL = """
const done = arguments[0], list = document.getElementById('rollouts'), drawn = [];
let steps = 0, last = performance.now(), longest = 0;
const advance = () => {
  longest = Math.max(longest, performance.now() - last);
  last = performance.now();
  drawn.push(list.querySelectorAll('.token').length);
  list.scrollTop += list.scrollHeight / 40;
  steps += 1;
  if (steps < 60) requestAnimationFrame(advance); else done([longest, Math.max(...drawn), list.innerText]);
};
requestAnimationFrame(advance);
"""


@pytest.fixture(scope="module")
def large_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with 50,000 tokens and four teachers."""
    names = ("near", "far", "answer", "base")
    short = report_maker()(lambda correct, depth: (0.1,) * 4, questions=50, teachers=names, depths=(0,))
    report = update_only(with_texts(short, 500), lambda correct: (0.3, -0.2, 0.1, 0.0))
    return write_report(report, tmp_path_factory.mktemp("large") / "report.html")


def test_fifty_thousand_tokens_open_filter_and_scroll_fast(browser: Any, large_page: Path) -> None:
    """The bounds are generous: ``benchmarks/report_page.py`` prints what an idle machine takes."""
    open_page(browser, large_page)
    assert browser.find_element(By.ID, "count").text == "50000 tokens in 100 rollouts"
    timing = browser.execute_script("return performance.getEntriesByType('navigation')[0].domComplete")
    assert timing < 5_000
    filters = (("teacher", "1"), ("sort", "harm"), ("significant", True), ("correct", "0"), ("from", "100"))
    assert max(browser.execute_script(FILTER, *one) for one in filters) < 2_000
    browser.refresh()
    longest, most_drawn, end = browser.execute_async_script(SCROLL)
    assert longest < 2_000
    assert 0 < most_drawn < 6_000, "the rest is not drawn"
    assert "question 49" in end, "and yet the last rollout is reached"


def test_what_was_left_by_scrolling_comes_back(browser: Any, large_page: Path) -> None:
    open_page(browser, large_page)
    first = tokens(browser)[0]
    first.click()
    assert "pinned" in first.get_attribute("class")
    browser.execute_script("document.activeElement.blur(); document.getElementById('rollouts').scrollTop = 1e6")
    WebDriverWait(browser, 10).until(lambda _: "question 49" in browser.find_element(By.ID, "rollouts").text)
    assert not browser.find_elements(By.CSS_SELECTOR, '[data-rollout="0"]'), "far from the window"
    browser.execute_script("document.getElementById('rollouts').scrollTop = 0")
    WebDriverWait(browser, 10).until(lambda _: tokens(browser, ".pinned"))
    assert tokens(browser)[0].get_attribute("data-rollout") == "0"
    assert "pinned" in tokens(browser)[0].get_attribute("class")


def test_the_arrow_keys_go_on_into_what_is_not_drawn(browser: Any, large_page: Path) -> None:
    open_page(browser, large_page)
    drawn = {token.get_attribute("data-rollout") for token in tokens(browser)}
    last = max(map(int, drawn))
    token = tokens(browser, f'[data-rollout="{last}"][data-depth="499"]')[0]
    browser.execute_script("arguments[0].focus({preventScroll: true})", token)
    token.send_keys(Keys.ARROW_RIGHT)
    focused = browser.switch_to.active_element
    assert [focused.get_attribute(f"data-{name}") for name in ("rollout", "depth")] == [str(last + 1), "0"]


def test_hostile_text_does_nothing(browser: Any, make_report: MakeReport, tmp_path: Path) -> None:
    open_page(browser, write_report(hostile(make_report), tmp_path / "<img src=x>.html"))
    for token in tokens(browser)[:12]:
        ActionChains(browser).move_to_element(token).perform()
    assert HOSTILE[0] in browser.find_element(By.ID, "rollouts").text
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    assert not browser.find_elements(By.TAG_NAME, "img")
    assert not browser.get_log("browser")


@pytest.mark.parametrize("width", [400, 1300])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_and_reads_in_both_schemes(browser: Any, width: int, scheme: str, tmp_path: Path) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    report = with_update(many_teachers(8), lambda correct: tuple(0.1 * index - 0.3 for index in range(8)))
    open_page(browser, write_report(report, tmp_path / "report.html"))
    overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    all_tokens = tokens(browser, ".node")
    middle = all_tokens[len(all_tokens) // 2]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", middle)
    middle.click()
    panel = browser.execute_script("return document.getElementById('panel').getBoundingClientRect()")
    assert 0 <= panel["top"] < 900
    assert panel["bottom"] <= 900
    assert panel["right"] <= width
    hidden_width = browser.execute_script(
        "const p = document.getElementById('panel'); return p.scrollWidth - p.clientWidth"
    )
    assert hidden_width <= 0, "nothing of eight teachers is cut off at the side"
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
