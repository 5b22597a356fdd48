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
from selenium.webdriver.support.ui import WebDriverWait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from odp_callbacks.analysis.summaries import scalars
from odp_callbacks.visualization.loggers import log_pictures
from odp_callbacks.visualization.tensorboard import as_code, changes, write_tensorboard
from tests.helpers.records import HOSTILE, MakeReport, hostile, in_modules, many_teachers, split


def written(folder: Path, *reports: Any) -> EventAccumulator:
    with SummaryWriter(str(folder)) as writer:
        previous = None
        for step, report in enumerate(reports):
            for name, value in scalars(report).items():
                writer.add_scalar(name, value, step)
            write_tensorboard(writer, report, step, previous)
            previous = report
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


@pytest.mark.parametrize("teachers", [2, 8])
def test_the_dashboard_names_scalars_that_there_are(teachers: int, make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split) if teachers == 2 else many_teachers(8)
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
    images = {"odp/rollout/correct", "odp/rollout/incorrect", "odp/summary/gain"}
    both = {f"odp/summary/{what}_over_depth" for what in ("alignment", "gain")}
    assert set(tags["images"]) == images | both | {"odp/summary/alignment_against_divergence"}
    text = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"] if "text" in tag
    }
    assert "Does the teacher pull" in text["odp/table/text_summary"]
    assert "since the last probe" in text["odp/changed/text_summary"]
    assert all(line.startswith("    ") for line in text["odp/table/text_summary"].split("\n"))


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_hyperparameters_stand_beside_scalars_that_there_are(
    make_report: MakeReport, prefix: str, tmp_path: Path
) -> None:
    report = replace(make_report(split), settings={"seed": 1, "continuations": 4, "divergence": "jsd"})
    with SummaryWriter(str(tmp_path)) as writer:
        for name, value in scalars(report).items():
            writer.add_scalar(prefix + name, value, 0)
        write_tensorboard(writer, report, 0, prefix=prefix)
    events = EventAccumulator(str(tmp_path)).Reload()
    held = {
        tag: HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)
        for tag in ("_hparams_/experiment", "_hparams_/session_start_info")
    }
    names = {info.name.tag for info in held["_hparams_/experiment"].experiment.metric_infos}
    assert names == {f"{prefix}odp/predicted_gain/{teacher}/all" for teacher in report.teachers}
    assert names <= set(events.Tags()["scalars"])
    found = held["_hparams_/session_start_info"].session_start_info.hparams
    assert set(found) == {"odp/continuations", "odp/divergence"}
    assert found["odp/continuations"].number_value == 4


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
    assert "odp/summary/gain" in wandb.shown
    assert "odp/summary-gain-00000003.png" in mlflow.shown


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module", params=[1, 2, 8])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """TensorBoard over a run of three probes, and how many teachers it has."""
    folder, count = tmp_path_factory.mktemp("run"), int(request.param)
    settings = {"continuations": 4, "divergence": "reverse_kl"}
    written(folder, *(replace(in_modules(many_teachers(count, seed=s)), settings=settings) for s in range(3)))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    with subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(120):
            try:
                urlopen(url).read()
                break
            except OSError:
                time.sleep(0.5)
        yield url, count
        process.terminate()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tensorboard_in_a_browser(browser: Any, page: tuple[str, int], scheme: str) -> None:
    url, teachers = page
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get_log("browser")
    wait = WebDriverWait(browser, 90)

    def see(tab: str) -> None:
        browser.get("about:blank")
        browser.get(f"{url}#{tab}")

    see("custom_scalars")
    # Charts of all teachers, of the first teacher (a page of four), and each has a line and a band per series.
    wait.until(lambda b: len(_all(b, "path.area")) >= 4 * teachers)
    assert all(" " in path.get_attribute("d") or "," in path.get_attribute("d") for path in _all(browser, "path.area"))
    assert len(_all(browser, "path.line")) >= 4 * teachers
    for title in ("Predicted gain, all teachers", *(f"Teacher: teacher {k}" for k in range(teachers))):
        assert _text(browser, title), title
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(48, 48, 48)") == (scheme == "dark")

    see("images")
    wait.until(lambda b: len([i for i in _all(b, "img") if i.get_property("naturalWidth") > 400]) >= 8)
    wait.until(lambda b: _text(b, "odp/rollout/incorrect") and _text(b, "odp/summary/alignment_by_module"))
    see("text")
    wait.until(lambda b: _text(b, "Does the teacher pull where success lies?", whole=True))
    see("hparams")
    wait.until(lambda b: _text(b, "odp/divergence", whole=True))
    see("histograms")
    wait.until(lambda b: _text(b, f"odp/alignment_histogram/teacher {min(teachers, 4) - 1}/correct", whole=True))
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not severe, "TensorBoard itself has none"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


ALL_MODULES = """
const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
"""


def _all(browser: Any, selector: str) -> list[Any]:
    """Elements of the page, also inside of its components."""
    script = f"{ALL_MODULES} return all(document).filter((e) => e.matches(arguments[0]));"
    found: list[Any] = browser.execute_script(script, selector)
    return found


def _text(browser: Any, text: str, whole: bool = False) -> bool:
    """Whether a text stands in an element without others, or anywhere in one if ``whole``."""
    script = f"""{ALL_MODULES} return all(document).some(
        (e) => (arguments[1] || e.childElementCount === 0) && e.textContent.includes(arguments[0]));"""
    return bool(browser.execute_script(script, text, whole))
