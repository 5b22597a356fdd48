"""What TensorBoard, and other loggers, are given; read back from the files, and seen in a browser."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from conftest import HOSTILE, MakeReport, hostile, split
from odp_callbacks.loggers import log_pictures
from odp_callbacks.summaries import scalars
from odp_callbacks.tensorboard import as_code, changes, write_tensorboard


def written(folder: Path, *reports: Any) -> EventAccumulator:
    with SummaryWriter(str(folder)) as writer:
        previous = None
        for step, report in enumerate(reports):
            for name, value in scalars(report).items():
                writer.add_scalar(name, value, step)
            write_tensorboard(writer, report, step, previous)
            previous = report
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def eight(make_report: MakeReport) -> Any:
    names = tuple(f"teacher {k}" for k in range(8))
    return make_report(lambda correct, depth: tuple(0.1 * k - 0.3 for k in range(8)), teachers=names)


@pytest.mark.parametrize("teachers", [2, 8])
def test_the_dashboard_names_scalars_that_there_are(teachers: int, make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split) if teachers == 2 else eight(make_report)
    events = written(tmp_path, report)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    known = set(events.Tags()["scalars"])
    series = [s for c in layout.category for chart in c.chart for s in chart.margin.series]
    assert len(series) == (4 + 3 * 3) * teachers + 1
    for one in series:
        assert {one.value, one.lower, one.upper} <= known
    lines = [tag.strip("^$") for c in layout.category for chart in c.chart for tag in chart.multiline.tag]
    assert set(lines) - {"odp/probe/time_share"} <= known, "the share of time is the monitor's"
    assert {c.title for c in layout.category} >= {"Predicted gain, all teachers", "Success and cost"}


def test_pictures_text_and_hyperparameters(make_report: MakeReport, tmp_path: Path) -> None:
    events = written(tmp_path, make_report(split), make_report(split, seed=1))
    tags = events.Tags()
    images = {"odp/rollout/correct", "odp/rollout/incorrect", "odp/pictures/gain"}
    both = {f"odp/pictures/{what}_over_depth" for what in ("alignment", "gain")}
    assert set(tags["images"]) == images | both | {"odp/pictures/alignment_against_divergence"}
    text = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"] if "text" in tag
    }
    assert "Does the teacher pull" in text["odp/table/text_summary"]
    assert "since the last probe" in text["odp/changed/text_summary"]
    assert all(line.startswith("    ") for line in text["odp/table/text_summary"].split("\n"))
    assert any("hparams" in tag for tag in tags["tensors"]) or "_hparams_/experiment" in events.summary_metadata


def test_a_change_needs_an_interval_without_0(make_report: MakeReport) -> None:
    low = make_report(lambda correct, depth: (0.1, 0.5), noise=0.01)
    high = make_report(lambda correct, depth: (0.9, 0.5), noise=0.01, seed=1)
    said = {line.partition(":")[0]: line for line in changes(low, high).split("\n")[2:]}
    assert said["near, all"].endswith("rose")
    assert said["far, all"].endswith("no measurable change")
    back = {line.partition(":")[0]: line for line in changes(high, low).split("\n")[2:]}
    assert back["near, all"].endswith("fell")


def test_hostile_text_stays_text(make_report: MakeReport, tmp_path: Path) -> None:
    events = written(tmp_path, replace(hostile(make_report), teachers=("<b>x", "$y$")))
    table = events.Tensors("odp/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "\x1b" not in table
    assert as_code(HOSTILE[2]).isprintable()


def test_other_loggers_get_the_pictures_they_can_show(make_report: MakeReport) -> None:
    class Wandb:
        experiment = object()

        def __init__(self) -> None:
            self.shown: list[str] = []

        def log_image(self, key: str, images: list[Any], step: int) -> None:
            assert all(hasattr(image, "savefig") for image in images)
            self.shown.append(key)

    class MLflow:
        run_id = "7"

        def __init__(self) -> None:
            self.experiment, self.shown = self, []

        def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
            assert run_id == "7"
            self.shown.append(artifact_file)

    wandb, mlflow = Wandb(), MLflow()
    for logger in (wandb, mlflow, object()):
        log_pictures(logger, make_report(split), 3)
    assert "odp/pictures/gain" in wandb.shown
    assert "odp/pictures-gain-00000003.png" in mlflow.shown


@pytest.fixture
def page(make_report: MakeReport, tmp_path: Path) -> Iterator[str]:
    written(tmp_path, eight(make_report), eight(make_report), eight(make_report))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)]
    with subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(120):
            try:
                urlopen(url).read()
                break
            except OSError:
                time.sleep(0.5)
        yield url
        process.terminate()


def test_the_dashboard_in_a_browser(browser: Any, page: str, tmp_path: Path) -> None:
    browser.get(f"{page}#custom_scalars")
    wait = WebDriverWait(browser, 60)
    wait.until(lambda b: "Predicted gain" in b.find_element(By.TAG_NAME, "body").text or _deep(b, "Predicted gain"))
    browser.get(f"{page}#images")
    wait.until(lambda b: b.execute_script(IMAGES) >= 4)
    assert not [line for line in browser.get_log("browser") if "odp" in line["message"]]


IMAGES = """
const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
return all(document).filter((e) => e.tagName === "IMG" && e.naturalWidth > 100).length;
"""
TEXT = """
const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
return all(document).some((e) => e.childElementCount === 0 && e.textContent.includes(arguments[0]));
"""


def _deep(browser: Any, text: str) -> bool:
    """Whether a text stands in the page, also inside of its components."""
    return bool(browser.execute_script(TEXT, text))
