"""What TensorBoard receives: read back from the event files, and seen in a browser."""

import json
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
from unittest.mock import patch
from urllib.request import urlopen

import pytest
from selenium.webdriver.support.ui import WebDriverWait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from odp_callbacks.analysis.scalar_selection import LogOption, ScalarSelection
from odp_callbacks.analysis.scalars import scalars
from odp_callbacks.callbacks.pooled_updates import PooledUpdates
from odp_callbacks.callbacks.step_curves import BatchGain, StepCurves
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization import tensorboard as module
from odp_callbacks.visualization.card_size import DOTS_PER_INCH
from odp_callbacks.visualization.tensorboard import TensorBoardReports
from odp_callbacks.visualization.tensorboard_tags import PINNED, interval_tags, pinned_cards
from tests.helpers.browser import open_browser
from tests.helpers.records import MakeReport, hostile, in_modules, many_teachers, split
from tests.helpers.tensorboard import read_events, read_runs
from tests.helpers.updates import update_only, with_update


def write_events(
    folder: Path, *reports: ProbeReport, confidence: float = 0.95, log: LogOption = "main", drawn: bool = False
) -> EventAccumulator:
    """Write reports and their scalars one after the other, as a callback does; returns the events of the main run.

    Pictures take most of the time, so they are drawn only on request.
    """
    draw = module.pictures if drawn else lambda analysis: iter(())
    tensorboard, steps = TensorBoardReports(confidence), StepCurves()
    with SummaryWriter(str(folder)) as writer, patch.object(module, "pictures", draw):
        for step, report in enumerate(reports):
            gain = "update_gain" if report.updates else "predicted_gain"
            selection = ScalarSelection(report.teachers, log, gain)
            metrics = {
                **scalars(report, confidence),
                "odp/probe/time_share": 0.1,
                **PooledUpdates(0.9, confidence).observe(report),
            }
            curves = steps.add([BatchGain((0.01, 0.02) if step else (), 1.0 + step, 4)], confidence)
            metrics |= {f"odp/step/{name}": value for name, value in curves.items()}
            selected = selection.selected(metrics, selection.drawn())
            own = tensorboard.write_scalars(writer, selected, report.teachers, step)
            for tag, value in own.items():
                writer.add_scalar(tag, value, step)
            writer.add_scalar("epoch", step, step)  # by Lightning
            tensorboard.write(writer, report, step)
    tensorboard.close()
    return read_events(folder)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pictures", lambda analysis: iter(()))


def event_steps(folder: Path, tag: str) -> list[int]:
    """List the steps of all events with a tag, also of those that an accumulator would drop as duplicates."""
    (path,) = folder.glob("*.tfevents.*")
    events = EventFileLoader(str(path)).Load()
    return [event.step for event in events if any(value.tag == tag for value in event.summary.value)]


def text_of(events: EventAccumulator, tag: str) -> str:
    text: str = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
    return text


def tags_of_all_runs(folder: Path) -> set[str]:
    return {tag for scalars in read_runs(folder).values() for tag in scalars}


def layout_of(events: EventAccumulator) -> Any:
    (event,) = events.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def charts_of(layout: Any) -> dict[str, list[str]]:
    """Titles of the charts of each page, in the order in which TensorBoard shows them."""
    return {
        page.title: [
            *(chart.title for chart in page.chart if not chart.HasField("margin")),
            *(chart.title for chart in list(page.chart)[::-1] if chart.HasField("margin")),
        ]
        for page in layout.category
    }


def tags_of_charts(layout: Any) -> set[str]:
    charts = [chart for page in layout.category for chart in page.chart]
    bands = {tag for chart in charts for one in chart.margin.series for tag in (one.value, one.lower, one.upper)}
    return bands | {tag.strip("^$") for chart in charts for tag in chart.multiline.tag}


def gains_by_class(correct: bool) -> tuple[float, ...]:
    return (0.6, -0.4 if correct else 0.1)


@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize("log", ["main", "all"])
def test_each_teacher_is_a_run_and_tags_do_not_name_it(teachers: int, log: LogOption, tmp_path: Path) -> None:
    report = with_update(many_teachers(teachers), lambda correct: (0.1,) * teachers)
    write_events(tmp_path, report, report, log=log)
    runs, logged = read_runs(tmp_path), scalars(report)
    for teacher in report.teachers:
        of_teacher = runs[f"odp/{teacher}"]
        assert [step for step, _ in of_teacher["odp/update_gain"]] == [0, 1]
        assert of_teacher["odp/update_gain"][0][1] == pytest.approx(logged[f"odp/update_gain/{teacher}/all"])
        ends = [of_teacher[tag][0][1] for tag in interval_tags("odp/update_gain", "odp")]
        expected = [logged[f"odp/update_gain_{end}/{teacher}/all"] for end in ("low", "high")]
        assert ends == pytest.approx(expected)
    assert not any("teacher 0" in tag for tag in tags_of_all_runs(tmp_path))
    assert runs["odp/reward change"] == {"odp/step/gain_sum": [(1, pytest.approx(0.25))]}
    (expected_sum,) = runs["."]["odp/step/gain_sum"]
    assert expected_sum == (1, pytest.approx(0.0075)), "the sum of the gains, in the same chart"
    assert len(runs) == 2 + teachers + (teachers * (teachers - 1) // 2 if log == "all" else 0)


def test_by_default_few_tags_are_written_and_none_is_nan(tmp_path: Path) -> None:
    """A probe of three teachers used to log 689 scalars."""
    report = with_update(many_teachers(3), lambda correct: (0.1,) * 3)
    write_events(tmp_path / "main", report, report)
    tags = tags_of_all_runs(tmp_path / "main")
    assert len(tags) <= 40
    first_group = sorted(tag for tag in tags if tag.startswith("odp/"))
    assert first_group == [
        "odp/pooled/update_gain", "odp/probe/success_rate", "odp/step/gain", "odp/step/gain_sum", "odp/step/reward",
        "odp/update_gain", "odp/update_gain/correct", "odp/update_gain/incorrect", "odp/update_gain/incorrect-correct",
    ]  # fmt: skip
    assert {f"odp/{tag.format(gain='update_gain')}" for tag in PINNED} <= set(first_group)
    write_events(tmp_path / "all", report, report, log="all")
    assert len(tags_of_all_runs(tmp_path / "all")) > 100
    for folder in (tmp_path / "main", tmp_path / "all"):
        values = [value for run in read_runs(folder).values() for events in run.values() for _, value in events]
        assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("teachers", [2, 3])
@pytest.mark.parametrize("log", ["main", "all"])
def test_the_dashboard_names_scalars_that_were_logged(
    teachers: int, log: LogOption, make_report: MakeReport, tmp_path: Path
) -> None:
    report = make_report(split) if teachers == 2 else many_teachers(3)
    report = with_update(report, lambda correct: (0.1,) * teachers)
    layout = layout_of(write_events(tmp_path, report, report, log=log))
    logged = tags_of_all_runs(tmp_path)
    assert tags_of_charts(layout) <= logged
    assert next(iter(charts_of(layout))) == "Update gain"
    assert ("Predicted gain" in charts_of(layout)) == (log == "all")
    band = layout.category[0].chart[-1].margin.series[0]
    assert (band.value, band.lower, band.upper) == ("odp/update_gain", *interval_tags("odp/update_gain", "odp"))


def test_no_chart_without_a_number_comes_first(make_report: MakeReport, tmp_path: Path) -> None:
    """Of one question there is no update gain: its empty charts used to be what TensorBoard opened with."""
    layout = layout_of(write_events(tmp_path / "one", update_only(make_report(split, questions=1), gains_by_class)))
    assert next(iter(charts_of(layout).items())) == (
        "Success and cost", ["Student's success rate", "Share of training time spent on probes"]
    )  # fmt: skip
    report = make_report(split)
    correct_only = replace(report, rollouts=tuple(replace(rollout, correct=True) for rollout in report.rollouts))
    layout = layout_of(write_events(tmp_path / "correct", update_only(correct_only, gains_by_class)))
    assert charts_of(layout)["Update gain"] == [
        "All rollouts", "Correct rollouts", "All probes so far", "Incorrect rollouts",
        "Incorrect minus correct rollouts",
    ]  # fmt: skip
    incorrect_only = replace(report, rollouts=tuple(replace(rollout, correct=False) for rollout in report.rollouts))
    layout = layout_of(write_events(tmp_path / "incorrect", update_only(incorrect_only, gains_by_class)))
    assert charts_of(layout)["Update gain"][:2] == ["All rollouts", "Incorrect rollouts"]


def test_without_an_update_teachers_are_compared_by_predicted_gain(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(split)
    layout = layout_of(write_events(tmp_path, report, report))
    assert next(iter(charts_of(layout))) == "Predicted gain"
    assert "odp/predicted_gain" in read_runs(tmp_path)["odp/near"]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(make_report: MakeReport, tmp_path: Path) -> None:
    for values in ({1: 0.1, 2: 0.2, 3: 0.3}, {2: 0.7, 3: 0.8}):
        tensorboard = TensorBoardReports()
        with SummaryWriter(str(tmp_path)) as writer:
            for step, value in values.items():
                tensorboard.write_scalars(writer, {"odp/update_gain/near/all": value}, ["near"], step)
        tensorboard.close()
    steps_and_values = [(1, pytest.approx(0.1)), (2, pytest.approx(0.7)), (3, pytest.approx(0.8))]
    assert read_runs(tmp_path)["odp/near"]["odp/update_gain"] == steps_and_values


def test_a_validation_on_its_own_replaces_nothing(tmp_path: Path) -> None:
    for step, is_training in ((5, True), (0, False)):
        tensorboard = TensorBoardReports()
        with SummaryWriter(str(tmp_path)) as writer:
            metrics = {"odp/update_gain/near/all": 0.1}
            tensorboard.write_scalars(writer, metrics, ["near"], step, is_training=is_training)
        tensorboard.close()
    assert sorted(step for step, _ in read_runs(tmp_path)["odp/near"]["odp/update_gain"]) == [0, 5]


def test_what_tensorboard_shows_of_an_update_alone(make_report: MakeReport, tmp_path: Path) -> None:
    reports = [update_only(make_report(split), gains_by_class, seed=seed) for seed in range(2)]
    events = write_events(tmp_path, *reports, drawn=True)
    images = ["gain/all_teachers", "gain/by_class_and_depth", "rollout/correct", "rollout/incorrect"]
    sorted_by_name = [f"odp pictures/{image}" for image in images]
    assert sorted(events.Tags()["images"]) == sorted_by_name, "TensorBoard sorts pictures by name"
    table = text_of(events, "odp/table/text_summary")
    assert table.index("update") < table.index("contri-")
    assert "predicted" not in table
    assert "Change in update gain since the previous probe" in text_of(events, "odp/changed/text_summary")
    assert "odp histograms/influence/correct" in read_events(tmp_path / "odp" / "near").Tags()["histograms"]
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    infos = HParamsPluginData.FromString(content).experiment.metric_infos
    assert {(info.name.group, info.name.tag) for info in infos} == {
        (f"odp/{teacher}", "odp/update_gain") for teacher in reports[0].teachers
    }


def test_pictures_text_and_hyperparameters(make_report: MakeReport, tmp_path: Path) -> None:
    events = write_events(tmp_path, make_report(split), make_report(split, seed=1), drawn=True)
    tags = events.Tags()
    images = {"rollout/correct", "rollout/incorrect", "summary/gain", "summary/alignment_against_divergence"}
    images |= {f"summary/{name}_over_depth" for name in ("alignment", "gain")}
    assert set(tags["images"]) == {f"odp pictures/{image}" for image in images}
    table = text_of(events, "odp/table/text_summary")
    assert "Does the teacher push towards success?" in table
    assert "since the previous probe" in text_of(events, "odp/changed/text_summary")
    assert all(line.startswith("    ") for line in table.split("\n"))


@pytest.mark.usefixtures("no_pictures")
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


@pytest.mark.usefixtures("no_pictures")
def test_a_failure_in_between_does_not_start_the_dashboard_anew(
    make_report: MakeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed probe, the dashboard used to be written again, without the change since the last report."""
    tensorboard, reports = TensorBoardReports(), [make_report(split, seed=seed) for seed in range(2)]
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.write(writer, reports[0], 0)
        with monkeypatch.context() as patched:
            patched.setattr(module, "table_text", lambda analysis: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tensorboard.write(writer, reports[1], 1)
        tensorboard.write(writer, reports[1], 2)
    assert len(event_steps(tmp_path, "custom_scalars__config__")) == 1
    assert event_steps(tmp_path, "odp/changed/text_summary") == [2]


@pytest.mark.usefixtures("no_pictures")
def test_what_writes_reports_can_be_pickled(make_report: MakeReport, tmp_path: Path) -> None:
    tensorboard = TensorBoardReports(0.8, root="odp-hard")
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.write(writer, make_report(split), 0)
        copy = pickle.loads(pickle.dumps(tensorboard))
        assert (copy.confidence, copy.root) == (0.8, "odp-hard")
        copy.write(writer, make_report(split), 1)
    assert len(event_steps(tmp_path, "custom_scalars__config__")) == 2, "it remembers no writer of another process"


@pytest.mark.usefixtures("no_pictures")
def test_the_confidence_level_reaches_the_texts(make_report: MakeReport, tmp_path: Path) -> None:
    reports = [make_report(split), make_report(split, seed=1)]
    for name, confidence in (("narrow", 0.8), ("wide", 0.95)):
        events = write_events(tmp_path / name, *reports, confidence=confidence)
        for tag in ("odp/table/text_summary", "odp/changed/text_summary"):
            assert f"{100 * confidence:g}% intervals" in text_of(events, tag)
    with pytest.raises(ValueError, match=r"`confidence` must .* but 95 was given"):
        TensorBoardReports(confidence=95)


def test_hyperparameters_are_listed_with_scalars_that_were_logged(make_report: MakeReport, tmp_path: Path) -> None:
    report = replace(make_report(split), settings={"seed": 1, "continuations": 4, "divergence": "jsd"})
    events = write_events(tmp_path, report)
    contents = {
        tag: HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)
        for tag in ("_hparams_/experiment", "_hparams_/session_start_info")
    }
    infos, runs = contents["_hparams_/experiment"].experiment.metric_infos, read_runs(tmp_path)
    assert [info.display_name for info in infos] == [f"predicted_gain, {teacher}" for teacher in report.teachers]
    assert all(info.name.tag in runs[info.name.group] for info in infos)
    settings = contents["_hparams_/session_start_info"].session_start_info.hparams
    assert set(settings) == {"odp/continuations", "odp/divergence"}
    assert settings["odp/continuations"].number_value == 4


def test_hostile_text_stays_text(make_report: MakeReport, tmp_path: Path) -> None:
    events = write_events(tmp_path, replace(hostile(make_report), teachers=("<b>x", "$y$")), drawn=True)
    assert "\x1b" not in text_of(events, "odp/table/text_summary")


# ---------------------------------------------------------------- in a browser

COLOURS = 7
"""Colours that TensorBoard has before it repeats them."""
SMALLEST_TEXT = 8
"""Points of the smallest text of a picture."""


@pytest.fixture(scope="module", params=[1, 2, 8])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Serve TensorBoard over a run of three probes; its address, and the number of teachers."""
    folder, count = tmp_path_factory.mktemp("run"), int(request.param)
    settings = {"continuations": 4, "divergence": "reverse_kl"}
    reports = [
        with_update(in_modules(many_teachers(count, seed=seed)), lambda correct: (0.1,) * count, seed=seed)
        for seed in range(3)
    ]
    write_events(folder, *(replace(report, settings=settings) for report in reports), drawn=True)
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of TensorBoard's own: what it writes to the console can arrive when the next page is already open."""
    with open_browser() as opened:
        yield opened


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
    # Three charts of the first page have a band for each teacher.
    wait.until(lambda b: len(all_elements(b, "path.area")) >= 3 * teachers)
    bands = all_elements(browser, "path.area")
    assert all(" " in path.get_attribute("d") or "," in path.get_attribute("d") for path in bands)
    assert len({path.value_of_css_property("fill") for path in bands}) >= min(teachers, COLOURS)
    for title in ("Update gain", "Steps", "Success and cost"):
        assert has_text(browser, title), title
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(48, 48, 48)") == (scheme == "dark")

    open_tab("images")
    wait.until(
        lambda b: len([image for image in all_elements(b, "img") if image.get_property("naturalWidth") > 400]) >= 8
    )
    wait.until(lambda b: has_text(b, "odp pictures/gain/all_teachers"))
    shown = [image for image in all_elements(browser, "img") if image.get_property("naturalWidth") > 400]
    scales = [image.size["width"] / image.get_property("naturalWidth") for image in shown if image.size["width"]]
    assert min(scales) * SMALLEST_TEXT * DOTS_PER_INCH / 72 >= 10, "pixels of the smallest text on a card"
    wait.until(lambda b: has_text(b, "odp pictures/summary/alignment_by_module"))
    open_tab("text")
    wait.until(lambda b: has_text(b, "Does the teacher push towards success?", whole=True))
    open_tab("hparams")
    wait.until(lambda b: has_text(b, "odp/divergence", whole=True))
    open_tab("histograms")
    wait.until(lambda b: has_text(b, "odp histograms/alignment/correct", whole=True))
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not severe, "TensorBoard itself logs no severe error"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.browser
def test_the_first_tab_shows_the_main_figures(browser: Any, page: tuple[str, int]) -> None:
    """Its first cards used to be NaN, among hundreds, and no chart compared teachers."""
    url, teachers = page
    with urlopen(f"{url}data/plugin/scalars/tags") as answer:
        tags_of_run = json.load(answer)
    assert len({tag for tags in tags_of_run.values() for tag in tags if tag.startswith("odp")}) <= 40
    assert set(tags_of_run) == {".", "odp/reward change", *(f"odp/teacher {index}" for index in range(teachers))}
    browser.get("about:blank")
    browser.get(url)
    wait = WebDriverWait(browser, 90)
    wait.until(lambda b: has_text(b, "9 cards") and len(titles_of_cards(b)) >= 3)
    shown = [title for title in titles_of_cards(browser) if title]
    assert shown[0] == "epoch", "Lightning's own"
    assert shown[1:3] == ["odp/pooled/update_gain", "odp/probe/success_rate"]
    browser.get("about:blank")
    browser.get(url.rstrip("/") + pinned_cards("odp"))
    pinned = [f"odp/{tag.format(gain='update_gain')}" for tag in PINNED]
    wait.until(lambda b: titles_of_cards(b)[: len(pinned)] == pinned)
    wait.until(lambda b: len(colours_of_first_card(b)) == teachers)
    assert len(set(colours_of_first_card(browser))) >= min(teachers, COLOURS)


def titles_of_cards(browser: Any) -> list[str | None]:
    """Tags of the cards of the first tab, from the top; None for those that are not drawn yet."""
    script = (
        "return [...document.querySelectorAll('card-view')].map((e) => e.querySelector('.tag')?.textContent.trim())"
    )
    titles: list[str | None] = browser.execute_script(script)
    return titles


def colours_of_first_card(browser: Any) -> list[str]:
    """Colours of the runs in the table of the first card."""
    script = """return [...document.querySelectorAll("card-view")[0].querySelectorAll(".row-circle > span")].map(
        (e) => getComputedStyle(e).backgroundColor);"""
    colours: list[str] = browser.execute_script(script)
    return colours


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
