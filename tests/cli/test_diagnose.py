"""``odp-callbacks diagnose`` and what follows it, on a tiny student in a local folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from odp_callbacks.cli.diagnose import DiagnoseOptions
from odp_callbacks.cli.main import main
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.storage import load
from tests.cli.conftest import OddLengthReward
from tests.helpers.command_line import ROWS, diagnose_arguments, printed_json

HOSTILE = "<script>alert(1)</script>\x1b[31m[red]\u202e"


def test_diagnose_ranks_and_writes_records_and_report(
    student_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*diagnose_arguments(student_folder, dataset, tmp_path / "out"), "--json"]) == 0
    ranking = printed_json(capsys)
    assert {ranked["teacher"] for ranked in ranking["classes"]["all"]} == {"answer", "base"}
    assert ranking["answer"]
    assert Path(ranking["report"]).read_text("utf-8").startswith("<!doctype html>")
    report = load(tmp_path / "out" / "records")
    assert [rollout.question for rollout in report.rollouts] == ["0", "0", "1", "1", "2", "2", "3", "3"]

    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "again.html"), "--json"]) == 0
    assert printed_json(capsys)["classes"] == ranking["classes"]
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out"), "--json"]) == 0
    assert all(row["difference"] in (0, None) for row in printed_json(capsys))
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 0
    assert "cannot tell" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out")[:-1] + "t", "--output", str(tmp_path / "again.html")]) == 0
    assert "Does the teacher push towards success?" in capsys.readouterr().out


def test_an_interrupted_diagnosis_resumes_and_repeats_no_part(
    student_folder: str,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    odd_reward: OddLengthReward,
) -> None:
    assert main([*diagnose_arguments(student_folder, dataset, tmp_path / "whole"), "--json"]) == 0
    uninterrupted, calls = printed_json(capsys), len(odd_reward.calls)
    odd_reward.calls.clear()
    odd_reward.interrupt_after = 2  # the first two are a trial and the rollouts of the update
    assert main(diagnose_arguments(student_folder, dataset, tmp_path / "out")) == 130
    assert "resumes from here" in capsys.readouterr().err
    odd_reward.interrupt_after = None
    assert (tmp_path / "out" / "update").exists()
    assert (tmp_path / "out" / "journal").exists()
    assert not (tmp_path / "out" / "records").exists()
    odd_reward.calls.clear()
    assert main([*diagnose_arguments(student_folder, dataset, tmp_path / "out"), "--json"]) == 0
    assert printed_json(capsys)["classes"] == uninterrupted["classes"]
    assert len(odd_reward.calls) < calls
    odd_reward.calls.clear()
    assert main([*diagnose_arguments(student_folder, dataset, tmp_path / "out"), "--json"]) == 0
    assert len(odd_reward.calls) <= 2, "the reward function is only tried, and nothing is measured again"
    assert main(diagnose_arguments(student_folder, dataset, tmp_path / "out", seed=3)) == 2
    assert "another `seed`" in capsys.readouterr().err


def test_a_printed_configuration_is_one_to_start_from(
    student_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*diagnose_arguments(student_folder, dataset, tmp_path / "out"), "--print_config"])
    assert exit_.value.code == 0
    configuration = capsys.readouterr().out
    assert yaml.safe_load(configuration)["measure"]["continuations"] == 2
    path = tmp_path / "config.yaml"
    path.write_text(configuration)
    assert main(["diagnose", "--config", str(path), "--json", "--questions=2"]) == 0
    assert len(load(tmp_path / "out" / "records").rollouts) == 4


def test_every_option_of_a_probe_is_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["diagnose", "--dataset=rows.jsonl", "--teachers={}", "--print_config"])
    measure = yaml.safe_load(capsys.readouterr().out)["measure"]
    assert list(measure) == list(ProbeConfig.__dataclass_fields__)
    defaults = DiagnoseOptions(dataset="rows.jsonl", teachers={}).measure
    assert ProbeConfig(**{**measure, "eos_token_ids": tuple(measure["eos_token_ids"])}) == defaults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "`dataset` is 'nowhere.jsonl', but there is no such file"),
        ({"reward": "no.such.reward"}, "`reward` is 'no.such.reward'"),
        ({"reward": "task"}, "this dataset has no reward function of its own"),
        ({"questions": 0}, "`questions` must be a positive integer"),
        ({"measure.max_new_tokens": 0}, "`max_new_tokens` must be a positive integer"),
        ({"measure.nodes": "some"}, "`nodes` must be one of"),
        ({"teachers": '{"x": "nothing"}'}, "`teachers` knows 'base' and templates"),
        ({"teachers": '{"x": "{hint} {prompt}"}'}, "names the column 'hint'"),
        ({"teachers": '{"x": "{prompt"}'}, "`teachers` has 'x', whose context does not fit"),
        ({"teachers": '{"base": "base", "big": "model:./no/such/folder"}'}, "`teachers` names './no/such/folder'"),
        ({"student": "./no/such/folder"}, "`student` names './no/such/folder'"),
        ({"stop": '[""]'}, "`stop` has ''"),
        ({"confidence": 2}, "`confidence` must lie in (0, 1)"),
        ({"dtype": "int8"}, "`dtype` must be 'auto' or one of"),
        ({"device": "cuda:77"}, "`device` must be one that this machine has"),
        ({"device": "gpu"}, "`device` must be one that this machine has"),
    ],
)
def test_bad_arguments_end_with_2_and_say_what_would_work(
    changes: dict[str, Any],
    message: str,
    student_folder: str,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(diagnose_arguments(student_folder, dataset, tmp_path / "out", **changes)) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["diagnose", "--no_such_flag=1"])
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("text", "reward", "message"),
    [
        ("", "odd", "which is empty"),
        ('{"prompt": "a"', "odd", "cannot be read as .jsonl"),
        ('{"question": "a"}', "odd", "must have a column 'prompt'"),
        (
            '{"prompt": "a"}',
            "exact",
            "`reward` is 'exact', which reads a column 'answer', but `dataset` has ['prompt']",
        ),
    ],
)
def test_a_bad_dataset_is_refused_before_a_model_is_loaded(
    text: str, reward: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    changes = {"reward": reward, "teachers": '{"base": "base"}'}
    assert main(diagnose_arguments("no/model", str(path), tmp_path / "out", **changes)) == 2
    assert message in capsys.readouterr().err


def test_hostile_names_and_questions_are_text(
    student_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{HOSTILE} {row['prompt']}", "answer": row["answer"]} for row in ROWS]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    teachers = json.dumps({"[bold]<b>x": "{answer} {prompt}"})
    folder = tmp_path / "<i> & out"
    assert main(diagnose_arguments(student_folder, str(path), folder, teachers=teachers, questions=2)) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out
    assert "<b>x" in out
    assert "<script>alert" not in (folder / "report.html").read_text("utf-8")
