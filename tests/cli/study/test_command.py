"""``odp-callbacks study`` on tiny students in a local folder."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from odp_callbacks.cli.main import main
from odp_callbacks.cli.study import units
from odp_callbacks.cli.study.command import run_study
from odp_callbacks.cli.study.plan import MEASUREMENTS, StudyOptions, study_options
from odp_callbacks.storage.study_summaries import load_summaries
from tests.cli.conftest import OddLengthReward
from tests.helpers.command_line import ROWS

TEACHERS = {
    "Self-1C": "{demonstrations[0]} {prompt}",
    "Self-1C1W": "{wrong_demonstrations[0]} {demonstrations[0]} {prompt}",
    "control": "{answer} {prompt}",
}


@pytest.fixture
def given(student_folder: str, dataset: str, tmp_path: Path) -> dict[str, Any]:
    """A study of one student on one task, as a YAML file says it."""
    return {
        "students": {"first": {"model": student_folder}},
        "tasks": {"letters": {"dataset": dataset, "reward": "odd", "questions": len(ROWS)}},
        "teachers": TEACHERS,
        "demonstrations": {"max_new_tokens": 6},
        "update": {"rollouts_per_question": 4, "max_new_tokens": 4, "influence": False},
        "nodes": {"rollouts_per_question": 2, "max_new_tokens": 4, "budget": 100, "step_alignment": False},
        "paper": {"rollouts_per_question": 8, "enriched_visits": 4, "minimum_visits": 2, "max_new_tokens": 4},
        "teacher_accuracy": 2,
        "lora_rank": 2,
        "output": str(tmp_path / "study"),
    }


@pytest.fixture
def arguments(given: dict[str, Any], tmp_path: Path) -> list[str]:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(given))
    return ["study", "--config", str(file)]


def options_of(given: dict[str, Any], **changes: Any) -> StudyOptions:
    return study_options({**given, **changes})


def test_a_study_measures_every_cell_and_writes_a_page(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 of 5: demonstrations of first on letters" in printed
    cells = load_summaries(tmp_path / "study" / "summaries.json")
    assert [cell.measurement for cell in cells] == list(MEASUREMENTS)
    page = (tmp_path / "study" / "study.md").read_text()
    assert "# Do the paper's findings hold here?" in page
    assert "Deviation: G, the rollouts of a question, = 8 instead of 200." in page
    assert (tmp_path / "study" / "images" / "study-gaps.svg").read_text().startswith("<svg")
    assert main(arguments) == 0
    assert "5 of 5" not in capsys.readouterr().out  # nothing is measured again
    moved = tmp_path / "docs" / "findings.md"
    records = ["--records", str(tmp_path / "study" / "summaries.json"), "--page", str(moved)]
    assert main([*arguments, *records]) == 0
    assert moved.read_text().replace("findings-", "study-") == page


def test_it_stops_between_units_when_the_time_is_over_and_goes_on(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**given, "measurements": ["update", "paper"]}
    ticks = iter([0.0, *[0.0] * 4, *[7200.0] * 99])
    assert run_study(options_of(given, hours=1.0), Console(width=200), clock=lambda: next(ticks)) == 0
    printed = capsys.readouterr().out
    assert "no time for: paper of first on letters" in printed
    assert "The same command goes on from here." in printed
    (cell,) = load_summaries(tmp_path / "study" / "summaries.json")
    assert cell.measurement == "update"
    assert run_study(options_of(given, hours=0.0), Console(width=200)) == 0  # only the page
    assert "1 of 3" not in capsys.readouterr().out
    assert run_study(options_of(given), Console(width=200)) == 0
    printed = capsys.readouterr().out
    assert "3 of 3: paper of first on letters" in printed
    assert "2 of 3" not in printed


def test_an_interrupted_cell_goes_on_inside(given: dict[str, Any], tmp_path: Path, odd_reward: OddLengthReward) -> None:
    given = {**given, "measurements": ["paper"]}
    assert run_study(options_of(given, output=str(tmp_path / "whole")), Console()) == 0
    assert run_study(options_of(given, measurements=[]), Console()) == 0  # the demonstrations
    odd_reward.calls.clear()
    odd_reward.interrupt_after = 0  # the rollouts have been sampled and are scored
    with pytest.raises(KeyboardInterrupt):
        run_study(options_of(given), Console())
    (journal,) = (tmp_path / "study" / "first" / "letters" / "paper").glob("*.journal")
    assert journal.stat().st_size > 0
    odd_reward.interrupt_after = None
    assert run_study(options_of(given), Console()) == 0
    assert not journal.exists()
    resumed, whole = (load_summaries(tmp_path / name / "summaries.json")[0] for name in ("study", "whole"))
    assert resumed.figures == whole.figures


def test_a_cell_that_fails_is_reported_once_and_the_others_go_on(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**given, "measurements": ["update", "accuracy"]}
    given["students"]["second"] = {**given["students"]["first"], "questions": 3}
    diagnose = units.diagnose

    def failing(options: Any, console: Console) -> Any:
        if "first" in options.output:
            raise RuntimeError("out of memory\nand more")
        return diagnose(options, console)

    monkeypatch.setattr(units, "diagnose", failing)
    assert run_study(options_of(given), Console(width=300)) == 1
    printed = capsys.readouterr().out
    assert printed.count("out of memory") == 1
    assert "failed: update of first on letters" in printed
    assert "not started, because what they need failed: accuracy of first on letters" in printed
    failure = tmp_path / "study" / "first" / "letters" / "update" / "update.failure.txt"
    assert "RuntimeError: out of memory" in failure.read_text()
    cells = load_summaries(tmp_path / "study" / "summaries.json")
    assert [(cell.student, cell.measurement) for cell in cells] == [("second", "update"), ("second", "accuracy")]
    assert {cell.questions for cell in cells} == {2}  # of 3, one has no demonstrations
    monkeypatch.undo()


def test_units_with_other_options_are_refused_before_anything_is_measured(
    given: dict[str, Any], tmp_path: Path
) -> None:
    given = {**given, "measurements": ["update"]}
    assert run_study(options_of(given), Console()) == 0
    changed = {**given["teachers"], "another": "{answer} {answer} {prompt}"}
    with pytest.raises(ValueError, match="holds update of first on letters with another `teachers`"):
        run_study(options_of(given, teachers=changed), Console())
    with pytest.raises(ValueError, match="with another `demonstrations`"):
        run_study(options_of(given, demonstrations={"max_new_tokens": 7}), Console())
    assert run_study(options_of(given, hours=2.0, page=str(tmp_path / "page.md")), Console()) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": {}}, "`students` is empty"),
        ({"tasks": {"a/b": {"dataset": "x"}}}, "'a/b', which names no folder"),
        ({"measurements": ["updates"]}, "'updates', which is none of"),
        ({"measurements": ["accuracy"]}, "goes on from 'update'"),
        ({"teachers": {"big": "model:x"}}, "another model"),
        ({"hours": -1.0}, "`hours` must be 0 or positive"),
        ({"confidence": 1.5}, "`confidence` must lie in"),
    ],
)
def test_options_that_do_not_work_are_refused(given: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_study(options_of(given, **changes), Console())


def test_the_examples_are_studies() -> None:
    folder = Path(__file__).parents[3] / "examples" / "study"
    for file in folder.glob("*.yaml"):
        given = yaml.safe_load(file.read_text())
        options = options_of({"demonstrations": {}, "update": {}, "paper": {}, "nodes": {}, **given})
        options.check()
        for task in options.tasks.values():
            rows, _ = task.load()
            assert len(rows) == task.questions, file
