"""Take the pictures that README and documentation show, from records and TensorBoard's files of real runs.

Run: odp-callbacks diagnose --config examples/diagnose/chain_sum.yaml; odp-callbacks demo;
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

HERE = Path(__file__).parent / "images"


def browser() -> webdriver.Chrome:
    """Headless, as in the tests."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1500"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def report(page: Path, window: webdriver.Chrome) -> None:
    """The answer, and below it a token with what stands behind it."""
    window.get(page.resolve().as_uri())
    tokens = window.find_elements(By.CSS_SELECTOR, "#rollouts .tok.defined")
    window.save_screenshot(str(HERE / "report.png"))
    ActionChains(window).move_to_element(tokens[min(3, len(tokens) - 1)]).perform()
    window.execute_script("document.getElementById('controls').scrollIntoView()")
    time.sleep(0.5)
    window.save_screenshot(str(HERE / "tokens.png"))


def tensorboard(folder: Path, window: webdriver.Chrome) -> None:
    """The dashboard, and the rollouts with coloured tokens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    with subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.DEVNULL) as process:
        time.sleep(15)
        window.set_window_size(1500, 1100)
        for tab, query in (("custom_scalars", ""), ("images", "&tagFilter=odp%2F")):
            window.get("about:blank")
            window.get(f"http://127.0.0.1:{port}/#{tab}{query}")
            time.sleep(10)
            window.save_screenshot(str(HERE / f"tensorboard_{tab}.png"))
        process.terminate()


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    with browser() as chromium:
        report(Path(sys.argv[1]), chromium)
        tensorboard(Path(sys.argv[2]), chromium)
