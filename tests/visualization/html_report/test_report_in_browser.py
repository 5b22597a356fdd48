"""The report in a real browser."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.visualization.html_report import write_report
from tests.helpers.records import HOSTILE, MakeReport, hostile, many_teachers, split

pytestmark = pytest.mark.browser


def opened(browser: Any, path: Path) -> None:
    browser.get(path.as_uri())
    assert not browser.get_log("browser"), "the console must stay silent"


def tokens(browser: Any, extra: str = "") -> list[Any]:
    found: list[Any] = browser.find_elements(By.CSS_SELECTOR, f"#rollouts .tok[data-d]{extra}")
    return found


def test_hover_filter_and_sort(browser: Any, make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split, success=(0.0, 1.0))
    apart = tuple(replace(n, gram=np.concatenate([0.7 * n.gram, 0.3 * n.gram])) for n in report.nodes)
    report = replace(report, nodes=apart, modules=("layers.0.q_proj", "layers.1.q_proj"))
    opened(browser, write_report(report, tmp_path / "report.html"))
    assert "“near”" in browser.find_element(By.ID, "answer").text
    assert len(tokens(browser)) == len(report.nodes)
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    panel = browser.find_element(By.ID, "panel")
    assert "Alignment by layer and module" in browser.find_element(By.TAG_NAME, "main").text
    for text in ("could stand here", "near", "far", "pushed", "%"):
        assert text in panel.text
    tokens(browser)[0].send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tokens(browser)[1]
    assert f"Token {report.nodes[1].depth} " in panel.text

    assert len(browser.find_elements(By.CSS_SELECTOR, '#rollouts [tabindex="0"]')) == 1, "one stop for all tokens"
    tokens(browser)[2].click()
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    assert f"Token {report.nodes[2].depth} " in panel.text, "held"
    tokens(browser)[2].click()
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    assert f"Token {report.nodes[0].depth} " in panel.text, "let go"

    tokens(browser)[1].send_keys(Keys.ENTER)
    ActionChains(browser).move_to_element(tokens(browser)[3]).perform()
    assert f"Token {report.nodes[1].depth} " in panel.text, "held by keyboard"
    tokens(browser)[1].send_keys(Keys.SPACE)

    Select(browser.find_element(By.ID, "correct")).select_by_value("0")
    assert len(browser.find_elements(By.CLASS_NAME, "rollout")) == sum(not r.correct for r in report.rollouts)
    start = browser.find_element(By.ID, "from")
    start.clear()
    start.send_keys("3")
    assert len(tokens(browser, ":not(.faded)")) == sum(not n.correct and n.depth >= 3 for n in report.nodes)
    Select(browser.find_element(By.ID, "correct")).select_by_value("")
    Select(browser.find_element(By.ID, "teacher")).select_by_value("1")
    Select(browser.find_element(By.ID, "sort")).select_by_value("harm")
    assert "· correct" in browser.find_element(By.CLASS_NAME, "rollout").text, "the far one harms correct rollouts"
    Select(browser.find_element(By.ID, "sort")).select_by_value("help")
    assert "· incorrect" in browser.find_element(By.CLASS_NAME, "rollout").text
    browser.find_element(By.ID, "certain").click()
    deep = [n for n, node in enumerate(report.nodes) if node.depth >= 3]
    sure = [report.nodes[n].rollout for n in deep if Analysis(report).sure()[n, 1]]
    assert len(sure) > 0
    told = f"{len(sure)} measured tokens in {len(set(sure))} rollouts"
    assert browser.find_element(By.ID, "count").text == told
    assert len(tokens(browser, ":not(.faded)")) == len(sure)
    start.clear()
    start.send_keys("999")
    assert browser.find_element(By.ID, "count").text == "0 measured tokens in 0 rollouts"
    assert not browser.find_elements(By.CLASS_NAME, "rollout")
    assert "No measured token" in panel.text
    assert not browser.get_log("browser")


def test_tokens_whose_side_is_not_sure_look_it(browser: Any, make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split)
    doubtful = tuple(replace(n, total=np.array([2.0, 2.5])) if i % 2 else n for i, n in enumerate(report.nodes))
    report = replace(report, nodes=doubtful)
    sure = Analysis(report).sure()[:, 0]
    assert 0 < sure.sum() < len(sure)
    opened(browser, write_report(report, tmp_path / "report.html"))
    for token, certain in zip(tokens(browser), sure, strict=True):
        assert ("sure" in token.get_attribute("class").split()) == certain
        assert (token.value_of_css_property("background-color") == "rgba(0, 0, 0, 0)") == (not certain)
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    assert "true one" in browser.find_element(By.ID, "panel").text


def test_the_free_mode_shows_rewards_and_no_continuation(browser: Any, make_report: MakeReport, tmp_path: Path) -> None:
    opened(browser, write_report(replace(make_report(split), free=True), tmp_path / "report.html"))
    ActionChains(browser).move_to_element(tokens(browser)[0]).perform()
    panel = browser.find_element(By.ID, "panel").text
    assert "no continuation was sampled" in panel
    assert "reward" in panel
    assert "success with" not in panel
    assert len(browser.find_elements(By.CSS_SELECTOR, "#panel tr.q")) == 1, "the token that was taken"


def test_hostile_text_does_nothing(browser: Any, make_report: MakeReport, tmp_path: Path) -> None:
    opened(browser, write_report(hostile(make_report), tmp_path / "<img src=x>.html"))
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
    opened(browser, write_report(many_teachers(8), tmp_path / "report.html"))
    wider = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wider <= 0
    found = tokens(browser)
    middle = found[len(found) // 2]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", middle)
    middle.click()
    place = browser.execute_script("return document.getElementById('panel').getBoundingClientRect()")
    assert 0 <= place["top"] < 900
    assert place["bottom"] <= 900
    assert place["right"] <= width
    inner = browser.execute_script("const p = document.getElementById('panel'); return p.scrollWidth - p.clientWidth")
    assert inner <= 0, "nothing of eight teachers is cut off at the side"
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
