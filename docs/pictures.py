"""Take the screenshots that README and documentation show, from the records and TensorBoard files of real runs.

Run::

    odp-callbacks diagnose --config examples/diagnose/chain_sum.yaml
    odp-callbacks demo
    python docs/pictures.py diagnosis/chain_sum odp-demo
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from odp_callbacks.demo.tensorboard import PINNED, ROOT
from odp_callbacks.storage import load
from odp_callbacks.visualization.tensorboard_tags import pinned_cards

IMAGES = Path(__file__).parent / "images"
SECONDS_UNTIL_TENSORBOARD_SERVES = 15
SECONDS_UNTIL_A_TAB_IS_DRAWN = 10


def open_browser() -> webdriver.Chrome:
    """Start headless Chromium, with the flags that the tests use."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1500"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def photograph_report(page: Path, browser: webdriver.Chrome) -> None:
    """Save the top of the report, and a rollout with the details of one token."""
    browser.get(page.resolve().as_uri())
    browser.save_screenshot(str(IMAGES / "report.png"))
    browser.execute_script("document.getElementById('controls').scrollIntoView()")
    time.sleep(0.5)  # rollouts are drawn when they come into view
    tokens = browser.find_elements(By.CSS_SELECTOR, "#rollouts .token")
    ActionChains(browser).move_to_element(tokens[min(3, len(tokens) - 1)]).perform()
    time.sleep(0.5)
    browser.save_screenshot(str(IMAGES / "tokens.png"))


def photograph_notebook(records: Path, browser: webdriver.Chrome) -> None:
    """Save what a notebook shows of a report."""
    page = f"<html><body style='font-family: sans-serif'>{load(records)._repr_html_()}</body></html>"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cell.html"
        path.write_text(page, "utf-8")
        browser.set_window_size(900, 640)
        browser.get(path.as_uri())
        browser.save_screenshot(str(IMAGES / "notebook.png"))


def photograph_tensorboard(folder: Path, browser: webdriver.Chrome) -> None:
    """Save TensorBoard's first tab with the pinned cards, and the pictures of tokens and teachers."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--load_fast=false"]
    port = find_free_port()
    address = f"http://127.0.0.1:{port}/"
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL) as process:
        time.sleep(SECONDS_UNTIL_TENSORBOARD_SERVES)
        browser.set_window_size(1500, 1100)
        for name, place in (
            ("timeseries", pinned_cards(ROOT, tags=PINNED).lstrip("/")),
            ("images", "#images&tagFilter=odp%2F"),
        ):
            browser.get("about:blank")
            browser.get(address + place)
            time.sleep(SECONDS_UNTIL_A_TAB_IS_DRAWN)
            browser.save_screenshot(str(IMAGES / f"tensorboard_{name}.png"))
        process.terminate()


def find_free_port() -> int:
    """Return a TCP port that nothing uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    diagnosis, demo = map(Path, sys.argv[1:])
    with open_browser() as chromium:
        photograph_report(diagnosis / "report.html", chromium)
        photograph_tensorboard(demo, chromium)
        photograph_notebook(diagnosis / "records", chromium)
