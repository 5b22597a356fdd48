"""The command line, on a tiny student in a local folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from odp_callbacks.cli import datasets as questions
from odp_callbacks.cli.datasets import load_questions, load_reward
from odp_callbacks.cli.main import main
from odp_callbacks.storage import load
from tests.helpers.models import tiny_base, word_tokenizer

ROWS = [{"prompt": p, "answer": a} for p, a in zip(("a b", "c", "b a d", "d c"), "abcd", strict=True)]
HOSTILE = "<script>alert(1)</script>\x1b[31m[red]\u202e"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student")
    tiny_base("llama").float().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(path)


def odd(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    CALLS.append(len(completions))
    if STOP and len(CALLS) > STOP[0]:
        raise KeyboardInterrupt
    return [float(len(c.split()) % 2) for c in completions]


CALLS: list[int] = []
STOP: list[int] = []


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    STOP.clear()
    monkeypatch.setitem(questions.REWARDS, "odd", odd)


def arguments(model: str, rows: str, output: Path, **changes: Any) -> list[str]:
    options = {
        "dataset": rows, "student": model, "reward": "odd", "questions": 4, "output": str(output), "lora_rank": 2,
        "teachers": json.dumps({"answer": "{answer} {prompt}", "base": "base"}),
        "measure.rollouts_per_question": 2, "measure.max_new_tokens": 4, "measure.continuations": 2, **changes,
    }  # fmt: skip
    return ["diagnose", *(f"--{name}={value}" for name, value in options.items())]


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_diagnose_ranks_and_writes_records_and_report(
    student: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(student, dataset, tmp_path / "out"), "--json"]) == 0
    found = told(capsys)
    assert {p["teacher"] for p in found["classes"]["all"]} == {"answer", "base"}
    assert found["answer"]
    assert Path(found["report"]).read_text("utf-8").startswith("<!doctype html>")
    report = load(tmp_path / "out" / "records")
    assert [r.question for r in report.rollouts] == ["0", "0", "1", "1", "2", "2", "3", "3"]

    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "again.html"), "--json"]) == 0
    assert told(capsys)["classes"] == found["classes"]
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out"), "--json"]) == 0
    assert all(row["difference"] in (0, None) for row in told(capsys))
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 0
    assert "cannot tell" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out")[:-1] + "t", "--output", str(tmp_path / "again.html")]) == 0
    assert "Does the teacher pull" in capsys.readouterr().out


def test_interrupted_it_goes_on_and_repeats_no_question(
    student: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(student, dataset, tmp_path / "whole"), "--json"]) == 0
    whole, calls = told(capsys), len(CALLS)
    CALLS.clear()
    STOP.append(calls // 2)
    assert main(arguments(student, dataset, tmp_path / "out")) == 130
    assert "goes on from here" in capsys.readouterr().err
    STOP.clear()
    done = len(list((tmp_path / "out" / "questions").iterdir()))
    assert 0 < done < 4
    CALLS.clear()
    assert main([*arguments(student, dataset, tmp_path / "out"), "--json"]) == 0
    assert told(capsys)["classes"] == whole["classes"]
    assert len(CALLS) < calls
    CALLS.clear()
    assert main([*arguments(student, dataset, tmp_path / "out"), "--json"]) == 0
    assert len(CALLS) <= 2, "nothing but the trial of the reward is asked again"
    assert main(arguments(student, dataset, tmp_path / "out", seed=3)) == 2
    assert "another `seed`" in capsys.readouterr().err


def test_a_printed_configuration_is_one_to_start_from(
    student: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments(student, dataset, tmp_path / "out"), "--print_config"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["measure"]["continuations"] == 2
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["diagnose", "--config", str(path), "--json", "--questions=2"]) == 0
    assert len(load(tmp_path / "out" / "records").rollouts) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "`dataset` is 'nowhere.jsonl', but there is no such file"),
        ({"reward": "no.such.reward"}, "`reward` is 'no.such.reward'"),
        ({"reward": "task"}, "this dataset brings none"),
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
    ],
)
def test_bad_arguments_end_with_2_and_say_what_would_work(
    changes: dict[str, Any], message: str, student: str, dataset: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(arguments(student, dataset, tmp_path / "out", **changes)) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", "--no_such_flag=1"])
    assert ended.value.code == 2


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
    assert main(arguments("no/model", str(path), tmp_path / "out", **changes)) == 2
    assert message in capsys.readouterr().err


def test_records_of_one_name_are_told_apart_and_a_demo_s_folder_is_known(
    student: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        assert main(arguments(student, dataset, tmp_path / name, questions=1)) == 0
    page = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(page)]) == 0
    text = page.read_text("utf-8")
    assert "As training went" in text
    assert ">one<" in text
    assert ">two<" in text
    demo = tmp_path / "odp-demo" / "records"
    for name in ("step-00000000", "step-00000006"):
        shutil.copytree(tmp_path / "one" / "records", demo / name)
    assert main(["report", str(demo.parent), "--output", str(page), "--json"]) == 0
    assert "step-00000006" in page.read_text("utf-8")


def test_a_folder_without_records_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "there are no records" in capsys.readouterr().err


def test_hostile_names_and_questions_are_text(student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{HOSTILE} {r['prompt']}", "answer": r["answer"]}) for r in ROWS))
    teachers = json.dumps({"[bold]<b>x": "{answer} {prompt}"})
    folder = tmp_path / "<i> & out"
    assert main(arguments(student, str(path), folder, teachers=teachers, questions=2)) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out
    assert "<b>x" in out
    assert "<script>alert" not in (folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_questions_from_files(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    found = Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{kind}"
    {"jsonl": found.to_json, "parquet": found.to_parquet, "csv": found.to_csv}[kind](str(path))
    rows, own = load_questions(str(path), count=3)
    assert rows == ROWS[:3]
    assert own is None
    (tmp_path / "other.csv").write_text("question\nx\n")
    with pytest.raises(ValueError, match="must have a column 'prompt'"):
        load_questions(str(tmp_path / "other.csv"), count=3)


def test_questions_of_reasoning_gym() -> None:
    rows, reward = load_questions("reasoning-gym:chain_sum", count=5, shots=1)
    assert len({row["prompt"] for row in rows}) == 5
    assert reward is not None
    for row in rows:
        assert row["wrong_answer"] != row["answer"]
        right, wrong = (
            reward(["p"], [str(row[name])], entry=[row["entry"]]) for name in ("solution", "wrong_solution")
        )
        assert (right, wrong) == ([1.0], [0.0])
    assert load_reward("task", reward) is reward
    assert load_reward("odp_callbacks.cli.datasets.exact", None)(["p"], ["a "], answer=["a"]) == [1.0]
