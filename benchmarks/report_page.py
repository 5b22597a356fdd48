"""How fast the HTML report opens, filters and scrolls in headless Chromium, with many tokens.

The report is synthetic: four teachers, influences of all tokens, contributions of 60 modules, and a few measured
nodes in every rollout.

Run: python benchmarks/report_page.py
"""

import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selenium import webdriver
from sizes import parse_sizes

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.helpers.page_scripts import FILTER
from tests.helpers.records import report_maker
from tests.helpers.updates import with_module_products, with_texts, with_update

from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.html_report import write_report

USUAL = {"tokens": [5_000, 50_000], "length": 500, "modules": 60, "repeats": 7}
SMOKE = {"tokens": [400], "length": 50, "modules": 4, "repeats": 1}
TEACHERS = ("solution", "contrastive", "answer", "wrong answer")
FILTERS = (("teacher", "1"), ("sort", "harm"), ("significant", True), ("correct", "0"), ("from", "20"))
LOADED = """
const done = arguments[0], load = performance.getEntriesByType('navigation')[0];
const answer = () => {
  const paint = performance.getEntriesByName('first-contentful-paint')[0];
  if (paint) done([paint.startTime, load.domComplete]); else setTimeout(answer, 10);
};
answer();
"""
SCROLL = """
const done = arguments[0], list = document.getElementById('rollouts'), frames = [];
let last = performance.now();
const advance = () => {
  frames.push(performance.now() - last);
  last = performance.now();
  list.scrollTop += list.clientHeight;
  if (frames.length < 61) requestAnimationFrame(advance); else done(frames.slice(1));
};
requestAnimationFrame(advance);
"""


def large_report(tokens: int, length: int, modules: int) -> ProbeReport:
    """A report with about so many tokens, in pairs of responses of one length, and so many LoRA modules."""
    depths = tuple(depth for depth in (0, 2, 5, 20, 60, 200) if depth < length)
    questions = max(3, tokens // (2 * length))
    short = report_maker()(lambda correct, depth: (0.1,) * 4, questions=questions, teachers=TEACHERS, depths=depths)
    report = with_update(with_texts(short, length), lambda correct: (0.5, 0.45, 0.1, -0.2), noise=0.3)
    names = [f"layers.{layer}.self_attn.{kind}_proj" for layer in range(modules // 2) for kind in "qv"]
    return with_module_products(replace(report, modules=("layers.0.q_proj",)), dict.fromkeys(names, 1 / modules))


@contextmanager
def headless_chromium() -> Iterator[Any]:
    """A browser with a window of 1300 x 1000 pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def main(
    tokens: list[int] = USUAL["tokens"],
    length: int = USUAL["length"],
    modules: int = USUAL["modules"],
    repeats: int = USUAL["repeats"],
) -> dict[int, float]:
    """Print a row for each size, and return the milliseconds until each is loaded."""
    print(f"medians of {repeats} loads; the slowest in brackets; milliseconds in the browser")
    headings = {
        "tokens": 8,
        "MB": 6,
        "written (s)": 12,
        "first paint": 12,
        "loaded": 14,
        "filter": 12,
        "scroll frame": 14,
    }
    print(" ".join(f"{heading:>{width}}" for heading, width in headings.items()))
    loaded_by_size = {}
    with TemporaryDirectory() as folder, headless_chromium() as browser:
        for count in tokens:
            report = large_report(count, length, modules)
            start = time.perf_counter()
            path = write_report(report, Path(folder) / "report.html")
            written = time.perf_counter() - start
            paints, loads, filters, frames = [], [], [], []
            for _ in range(repeats):
                browser.get("about:blank")
                browser.get(path.as_uri())
                paint, loaded = browser.execute_async_script(LOADED)
                paints.append(paint)
                loads.append(loaded)
                frames += browser.execute_async_script(SCROLL)
                filters += [browser.execute_script(FILTER, *one) for one in FILTERS]
            shown = sum(len(rollout.pieces) for rollout in report.rollouts)
            print(
                f"{shown:>8} {path.stat().st_size / 1e6:>6.1f} {written:>12.1f} {statistics.median(paints):>12.0f} "
                f"{_median_and_largest(loads):>14} {_median_and_largest(filters):>12} {_median_and_largest(frames):>14}"
            )
            loaded_by_size[shown] = statistics.median(loads)
    return loaded_by_size


def _median_and_largest(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({max(values):.0f})"


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
