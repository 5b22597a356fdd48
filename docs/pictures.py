"""Take the screenshots that README and documentation show, from the records and TensorBoard files of real runs.

Run::

    odp-callbacks diagnose --config examples/diagnose/chain_sum.yaml
    odp-callbacks demo
    python docs/pictures.py diagnosis/chain_sum/report.html odp-demo
"""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

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
    tokens = browser.find_elements(By.CSS_SELECTOR, "#rollouts .token.defined")
    browser.save_screenshot(str(IMAGES / "report.png"))
    ActionChains(browser).move_to_element(tokens[min(3, len(tokens) - 1)]).perform()
    browser.execute_script("document.getElementById('controls').scrollIntoView()")
    time.sleep(0.5)
    browser.save_screenshot(str(IMAGES / "tokens.png"))


def photograph_tensorboard(folder: Path, browser: webdriver.Chrome) -> None:
    """Save TensorBoard's dashboard, and the rollouts with coloured tokens."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--load_fast=false"]
    port = find_free_port()
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL) as process:
        time.sleep(SECONDS_UNTIL_TENSORBOARD_SERVES)
        browser.set_window_size(1500, 1100)
        for tab, query in (("custom_scalars", ""), ("images", "&tagFilter=odp%2F")):
            browser.get("about:blank")
            browser.get(f"http://127.0.0.1:{port}/#{tab}{query}")
            time.sleep(SECONDS_UNTIL_A_TAB_IS_DRAWN)
            browser.save_screenshot(str(IMAGES / f"tensorboard_{tab}.png"))
        process.terminate()


def find_free_port() -> int:
    """Return a TCP port that nothing uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    with open_browser() as chromium:
        photograph_report(Path(sys.argv[1]), chromium)
        photograph_tensorboard(Path(sys.argv[2]), chromium)
