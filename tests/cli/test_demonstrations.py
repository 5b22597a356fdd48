"""``odp-callbacks demonstrations``, and a diagnosis with what it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from odp_callbacks.cli.datasets import load_questions
from odp_callbacks.cli.demonstration_files import load_rows, write_rows
from odp_callbacks.cli.main import main
from odp_callbacks.storage import load
from tests.cli.conftest import OddLengthReward
from tests.helpers.command_line import ROWS, diagnose_arguments, printed_json


def arguments(student_folder: str, dataset: str, output: Path, **changes: Any) -> list[str]:
    options = {
        "dataset": dataset,
        "model": student_folder,
        "reward": "odd",
        "output": str(output),
        "sample.tries": 20,
        "sample.max_new_tokens": 8,
        **changes,
    }
    return ["demonstrations", *(f"--{name}={value}" for name, value in options.items())]


def test_demonstrations_become_columns_that_contexts_show(
    student_folder: str,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    odd_reward: OddLengthReward,
) -> None:
    output = tmp_path / "demonstrations.parquet"
    more = {"sample.tries": 60, "sample.max_new_tokens": 6, "stop": '["a", "b"]'}
    made = arguments(student_folder, dataset, output, summaries="self", summary_max_new_tokens=20, **more)
    assert main([*made, "--json"]) == 0
    result = printed_json(capsys)
    rows = load_rows(str(output))
    assert result["questions"] == 4
    assert result["written"] == len(rows) > 1
    for row in rows:
        assert len(row["demonstrations"][0].split()) % 2 == 1
        assert len(row["wrong_demonstrations"][0].split()) % 2 == 0
        assert 0 < row["demonstration_successes"] < row["demonstration_tries"] <= 60
        assert (row["demonstration_model"], bool(row["summary"])) == (student_folder, True)
    calls = len(odd_reward.calls)
    before = output.read_bytes()
    assert main([*made, "--json"]) == 0
    assert printed_json(capsys) == result
    assert (output.read_bytes(), len(odd_reward.calls)) == (before, calls), "nothing is sampled again"
    assert load_questions(str(output), count=9)[0] == rows

    diagnosed = diagnose_arguments(
        student_folder,
        dataset,
        tmp_path / "out",
        demonstrations=json.dumps([str(output)]),
        teacher_accuracy=2,
        teachers=json.dumps({"base": "base", "1C": "self-1c", "short": "{summary} {prompt}"}),
        **{"measure.budget": 0},
    )
    assert main([*diagnosed, "--json"]) == 0
    output_of_diagnosis = capsys.readouterr()
    assert f"{len(rows)} of 4 questions have demonstrations" in output_of_diagnosis.err
    printed = json.loads(output_of_diagnosis.out)
    assert [own["teacher"] for own in printed["accuracy"]["teachers"]] == ["base", "1C", "short"]
    report = load(tmp_path / "out" / "records")
    assert len(report.teacher_responses) == 3 * 2 * len(rows)
    assert "How well each teacher answers by itself" in (tmp_path / "out" / "report.html").read_text("utf-8")
    calls = len(odd_reward.calls)
    assert main(diagnosed) == 0
    assert "How well does the teacher answer by itself?" in capsys.readouterr().out
    assert len(odd_reward.calls) <= calls + 1, "the reward function is only tried"
    assert load(tmp_path / "out" / "records").teacher_responses == report.teacher_responses


def test_an_interrupted_command_resumes(
    student_folder: str,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    odd_reward: OddLengthReward,
) -> None:
    def run(name: str) -> int:
        return main(arguments(student_folder, dataset, tmp_path / name, **{"sample.batch_size": 4}))

    assert run("whole.jsonl") == 0
    odd_reward.interrupt_after = len(odd_reward.calls) + 2
    assert run("part.jsonl") == 130
    assert "resumes from here" in capsys.readouterr().err
    assert not (tmp_path / "part.jsonl").exists()
    odd_reward.interrupt_after = None
    assert run("part.jsonl") == 0
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "rows.csv"}, "`output` must end in one of ['.jsonl', '.parquet']"),
        ({"sample.tries": 0}, "`tries` must be a positive integer"),
        (
            {"columns.prompt": "{question}"},
            "row 0 of `dataset` cannot be used: `columns.prompt` names the column 'question'",
        ),
        ({"preset": "squad"}, "`preset` must be one of"),
        ({"reward": "letter", "columns.answer": "{answer}!1"}, "`reward` 'letter' finds no answer"),
        ({"model": "./no/such/folder"}, "`model` names './no/such/folder'"),
        ({"summaries": "./no/such/folder"}, "`summaries` names './no/such/folder'"),
        (
            {"reward": "exact"},
            "none of 4 questions has all that was asked for (4 lack correct",
        ),
    ],
)
def test_bad_arguments_end_with_2(
    changes: dict[str, Any],
    message: str,
    student_folder: str,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"output": str(tmp_path / "rows.jsonl"), "columns.answer": "none", "sample.tries": 4, **changes}
    assert main(arguments(student_folder, dataset, Path(changes.pop("output")), **changes)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_files_of_other_questions_are_refused(
    student_folder: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def diagnose(file: str) -> str:
        changes = {"demonstrations": json.dumps([file]), "teachers": '{"1C": "self-1c"}'}
        assert main(diagnose_arguments(student_folder, dataset, tmp_path / "out", **changes)) == 2
        return " ".join(capsys.readouterr().err.split())

    other = tmp_path / "other.jsonl"
    write_rows([{"prompt": "another", "demonstrations": ["\u2028 a"]}], other)
    assert load_rows(str(other)) == [{"prompt": "another", "demonstrations": ["\u2028 a"]}]
    assert "`demonstrations` has none of the questions of `dataset`" in diagnose(str(other))
    assert "which is no .jsonl or .parquet file" in diagnose(str(tmp_path / "none.jsonl"))
    other.write_text("{")
    assert "which cannot be read" in diagnose(str(other))
    write_rows([{"prompt": row["prompt"], "demonstrations": []} for row in ROWS], other)
    assert "whose context does not fit" in diagnose(str(other))
