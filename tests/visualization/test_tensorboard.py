"""What TensorBoard receives: read back from the event files, and seen in a browser."""

import math
import pickle
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
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization import tensorboard as module
from odp_callbacks.visualization.tensorboard import TensorBoardReports
from tests.helpers.records import MakeReport, hostile, in_modules, many_teachers, split
from tests.helpers.updates import update_only, with_update


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def write_events(folder: Path, *reports: ProbeReport, confidence: float = 0.95) -> EventAccumulator:
    """Write reports and their scalars one after the other, and read back the events."""
    tensorboard = TensorBoardReports(confidence)
    with SummaryWriter(str(folder)) as writer:
        for step, report in enumerate(reports):
            for name, value in scalars(report, confidence).items():
                writer.add_scalar(name, value, step)
            tensorboard.write(writer, report, step)
    return read_events(folder)


def event_steps(folder: Path, tag: str) -> list[int]:
    """List the steps of all events with a tag, also of those that an accumulator would drop as duplicates."""
    (path,) = folder.iterdir()
    events = EventFileLoader(str(path)).Load()
    return [event.step for event in events if any(value.tag == tag for value in event.summary.value)]


def text_of(events: EventAccumulator, tag: str) -> str:
    text: str = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
    return text


@pytest.mark.parametrize("teachers", [2, 8])
def test_the_dashboard_names_scalars_that_were_logged(teachers: int, make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split) if teachers == 2 else many_teachers(8)
    events = write_events(tmp_path, report)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    logged = set(events.Tags()["scalars"])
    series = [
        series_of_chart
        for category in layout.category
        for chart in category.chart
        for series_of_chart in chart.margin.series
    ]
    assert len(series) == (4 + 3 * 3) * teachers + 1
    for band in series:
        assert {band.value, band.lower, band.upper} <= logged
    lines = [tag.strip("^$") for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert set(lines) - {"odp/probe/time_share"} <= logged, "the monitor logs the share of time"
    assert {category.title for category in layout.category} >= {"Predicted gain, all teachers", "Success and cost"}


def layout_of(events: EventAccumulator) -> Any:
    (event,) = events.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def gains_by_class(correct: bool) -> tuple[float, ...]:
    return (0.6, -0.4 if correct else 0.1)


@pytest.mark.parametrize("nodes", [True, False])
def test_the_dashboard_begins_with_the_update_gain(nodes: bool, make_report: MakeReport, tmp_path: Path) -> None:
    report = (with_update if nodes else update_only)(make_report(split), gains_by_class)
    events = write_events(tmp_path, report)
    layout, logged = layout_of(events), set(events.Tags()["scalars"])
    titles = [category.title for category in layout.category]
    assert titles[0] == "Update gain, all teachers"
    assert ("Predicted gain, all teachers" in titles) == nodes
    first_shown = layout.category[0].chart[-1]  # TensorBoard shows the charts of a page in reverse order
    assert first_shown.title == "All rollouts"
    assert [series.value for series in first_shown.margin.series] == [
        f"odp/update_gain/{teacher}/all" for teacher in report.teachers
    ]
    for category in layout.category:
        for chart in category.chart:
            for band in chart.margin.series:
                assert {band.value, band.lower, band.upper} <= logged
                assert nodes or "predicted_gain" not in band.value


def test_no_chart_without_a_number_comes_first(make_report: MakeReport, tmp_path: Path) -> None:
    """Of one question there is no update gain: its empty charts used to be what TensorBoard opened with."""
    layout = layout_of(write_events(tmp_path / "one", update_only(make_report(split, questions=1), gains_by_class)))
    assert layout.category[0].title == "Success and cost"
    assert layout.category[0].chart[-1].title == "Student's success rate"
    report = make_report(split)
    correct_only = replace(report, rollouts=tuple(replace(rollout, correct=True) for rollout in report.rollouts))
    layout = layout_of(write_events(tmp_path / "correct", update_only(correct_only, gains_by_class)))
    shown = [chart.title for chart in layout.category[0].chart][::-1]
    assert shown == [
        "All rollouts", "Correct rollouts", "Incorrect rollouts", "Incorrect minus correct rollouts",
    ]  # fmt: skip
    teacher = [chart.title for chart in layout.category[1].chart][::-1]
    assert teacher[0] == "Update gain, correct rollouts"
    incorrect_only = replace(report, rollouts=tuple(replace(rollout, correct=False) for rollout in report.rollouts))
    layout = layout_of(write_events(tmp_path / "incorrect", update_only(incorrect_only, gains_by_class)))
    shown = [chart.title for chart in layout.category[0].chart][::-1]
    assert shown[:2] == ["All rollouts", "Incorrect rollouts"], "those without a correct rollout come last"
    assert [chart.title for chart in layout.category[1].chart][-1] == "Update gain, incorrect rollouts"


def test_the_first_card_of_an_update_alone_has_a_number(make_report: MakeReport, tmp_path: Path) -> None:
    """Correlations with the alignment of no token used to be the first cards, all of them NaN."""
    events = write_events(tmp_path, update_only(make_report(split), gains_by_class))
    (first,) = events.Scalars(sorted(events.Tags()["scalars"])[0])
    assert math.isfinite(first.value)


def test_what_tensorboard_shows_of_an_update_alone(make_report: MakeReport, tmp_path: Path) -> None:
    reports = [update_only(make_report(split), gains_by_class, seed=seed) for seed in range(2)]
    events = write_events(tmp_path, *reports)
    images = ["odp/gain/all_teachers", "odp/gain/by_class_and_depth", "odp/rollout/correct", "odp/rollout/incorrect"]
    assert sorted(events.Tags()["images"]) == images, "TensorBoard sorts pictures by name"
    table = text_of(events, "odp/table/text_summary")
    assert table.index("update") < table.index("contri-")
    assert "predicted" not in table
    assert "Change in update gain since the previous probe" in text_of(events, "odp/changed/text_summary")
    assert "odp/influence_histogram/near/correct" in events.Tags()["histograms"]
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    names = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert names == {f"odp/update_gain/{teacher}/all" for teacher in reports[0].teachers}


def test_pictures_text_and_hyperparameters(make_report: MakeReport, tmp_path: Path) -> None:
    events = write_events(tmp_path, make_report(split), make_report(split, seed=1))
    tags = events.Tags()
    images = {"odp/rollout/correct", "odp/rollout/incorrect", "odp/summary/gain"}
    over_depth = {f"odp/summary/{name}_over_depth" for name in ("alignment", "gain")}
    assert set(tags["images"]) == images | over_depth | {"odp/summary/alignment_against_divergence"}
    table = text_of(events, "odp/table/text_summary")
    assert "Does the teacher push towards success?" in table
    assert "since the previous probe" in text_of(events, "odp/changed/text_summary")
    assert all(line.startswith("    ") for line in table.split("\n"))


def test_each_writer_receives_the_dashboard_once(make_report: MakeReport, tmp_path: Path) -> None:
    tensorboard, reports = TensorBoardReports(), [make_report(split, seed=seed) for seed in range(3)]
    with SummaryWriter(str(tmp_path / "first")) as first, SummaryWriter(str(tmp_path / "second")) as second:
        for step, report in enumerate(reports):
            tensorboard.write(first, report, step)
        tensorboard.write(second, reports[-1], 2)
    for name, reports_written in (("first", 3), ("second", 1)):
        events = read_events(tmp_path / name)
        for tag in ("custom_scalars__config__", "_hparams_/session_start_info"):
            assert len(event_steps(tmp_path / name, tag)) == 1, tag
        assert len(events.Tensors("odp/table/text_summary")) == reports_written
        has_changes = "odp/changed/text_summary" in events.Tags()["tensors"]
        assert has_changes == (reports_written > 1), "a writer's first report has nothing to be compared with"


def test_a_failure_in_between_does_not_start_the_dashboard_anew(
    make_report: MakeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed probe, the dashboard used to be written again, without the change since the last report."""
    tensorboard, reports = TensorBoardReports(), [make_report(split, seed=seed) for seed in range(2)]
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.write(writer, reports[0], 0)
        with monkeypatch.context() as patch:
            patch.setattr(module, "table_text", lambda analysis: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tensorboard.write(writer, reports[1], 1)
        tensorboard.write(writer, reports[1], 2)
    assert len(event_steps(tmp_path, "custom_scalars__config__")) == 1
    assert event_steps(tmp_path, "odp/changed/text_summary") == [2]


def test_what_writes_reports_can_be_pickled(make_report: MakeReport, tmp_path: Path) -> None:
    tensorboard = TensorBoardReports(0.8, prefix="train/")
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.write(writer, make_report(split), 0)
        copy = pickle.loads(pickle.dumps(tensorboard))
        assert (copy.confidence, copy.prefix) == (0.8, "train/")
        copy.write(writer, make_report(split), 1)
    assert len(event_steps(tmp_path, "custom_scalars__config__")) == 2, "it remembers no writer of another process"


def test_the_confidence_level_reaches_the_texts(make_report: MakeReport, tmp_path: Path) -> None:
    reports = [make_report(split), make_report(split, seed=1)]
    for name, confidence in (("narrow", 0.8), ("wide", 0.95)):
        events = write_events(tmp_path / name, *reports, confidence=confidence)
        for tag in ("odp/table/text_summary", "odp/changed/text_summary"):
            assert f"{100 * confidence:g}% intervals" in text_of(events, tag)
    with pytest.raises(ValueError, match=r"`confidence` must .* but 95 was given"):
        TensorBoardReports(confidence=95)


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_hyperparameters_are_listed_with_scalars_that_were_logged(
    make_report: MakeReport, prefix: str, tmp_path: Path
) -> None:
    report = replace(make_report(split), settings={"seed": 1, "continuations": 4, "divergence": "jsd"})
    with SummaryWriter(str(tmp_path)) as writer:
        for name, value in scalars(report).items():
            writer.add_scalar(prefix + name, value, 0)
        TensorBoardReports(prefix=prefix).write(writer, report, 0)
    events = EventAccumulator(str(tmp_path)).Reload()
    contents = {
        tag: HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)
        for tag in ("_hparams_/experiment", "_hparams_/session_start_info")
    }
    names = {info.name.tag for info in contents["_hparams_/experiment"].experiment.metric_infos}
    assert names == {f"{prefix}odp/predicted_gain/{teacher}/all" for teacher in report.teachers}
    assert names <= set(events.Tags()["scalars"])
    settings = contents["_hparams_/session_start_info"].session_start_info.hparams
    assert set(settings) == {"odp/continuations", "odp/divergence"}
    assert settings["odp/continuations"].number_value == 4


def test_hostile_text_stays_text(make_report: MakeReport, tmp_path: Path) -> None:
    events = write_events(tmp_path, replace(hostile(make_report), teachers=("<b>x", "$y$")))
    assert "\x1b" not in text_of(events, "odp/table/text_summary")


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module", params=[1, 2, 8])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Serve TensorBoard over a run of three probes; its address, and the number of teachers."""
    folder, count = tmp_path_factory.mktemp("run"), int(request.param)
    settings = {"continuations": 4, "divergence": "reverse_kl"}
    reports = [
        with_update(in_modules(many_teachers(count, seed=seed)), lambda correct: (0.1,) * count, seed=seed)
        for seed in range(3)
    ]
    write_events(folder, *(replace(report, settings=settings) for report in reports))
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
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

    def open_tab(tab: str) -> None:
        browser.get("about:blank")
        browser.get(f"{url}#{tab}")

    open_tab("custom_scalars")
    # Charts of all teachers, and of the first teacher, a page of four; each has a line and a band for each series.
    wait.until(lambda b: len(all_elements(b, "path.area")) >= 4 * teachers)
    assert all(
        " " in path.get_attribute("d") or "," in path.get_attribute("d") for path in all_elements(browser, "path.area")
    )
    assert len(all_elements(browser, "path.line")) >= 4 * teachers
    for title in (
        "Update gain, all teachers",
        "Predicted gain, all teachers",
        *(f"Teacher: teacher {k}" for k in range(teachers)),
    ):
        assert has_text(browser, title), title
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(48, 48, 48)") == (scheme == "dark")

    open_tab("images")
    wait.until(
        lambda b: len([image for image in all_elements(b, "img") if image.get_property("naturalWidth") > 400]) >= 8
    )
    wait.until(lambda b: has_text(b, "odp/gain/all_teachers") and has_text(b, "odp/summary/alignment_by_module"))
    open_tab("text")
    wait.until(lambda b: has_text(b, "Does the teacher push towards success?", whole=True))
    open_tab("hparams")
    wait.until(lambda b: has_text(b, "odp/divergence", whole=True))
    open_tab("histograms")
    wait.until(lambda b: has_text(b, f"odp/alignment_histogram/teacher {min(teachers, 4) - 1}/correct", whole=True))
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not severe, "TensorBoard itself logs no severe error"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


ALL_ELEMENTS = """
const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
"""


def all_elements(browser: Any, selector: str) -> list[Any]:
    """Find elements of the page, also inside of its components."""
    script = f"{ALL_ELEMENTS} return all(document).filter((e) => e.matches(arguments[0]));"
    elements: list[Any] = browser.execute_script(script, selector)
    return elements


def has_text(browser: Any, text: str, whole: bool = False) -> bool:
    """Whether an element without children has a text; any element counts if ``whole``."""
    script = f"""{ALL_ELEMENTS} return all(document).some(
        (e) => (arguments[1] || e.childElementCount === 0) && e.textContent.includes(arguments[0]));"""
    return bool(browser.execute_script(script, text, whole))
