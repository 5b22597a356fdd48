"""Questions from files and from reasoning-gym."""

from pathlib import Path

import pytest

from odp_callbacks.cli.datasets import load_questions
from odp_callbacks.cli.rewards import load_reward
from odp_callbacks.cli.tasks import make_task
from tests.helpers.command_line import ROWS


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_questions_from_files(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    table = Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{kind}"
    {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[kind](str(path))
    rows, task_reward = load_questions(str(path), count=3)
    assert rows == ROWS[:3]
    assert task_reward is None
    (tmp_path / "other.csv").write_text("question\nx\n")
    with pytest.raises(ValueError, match="must have a column 'prompt'"):
        load_questions(str(tmp_path / "other.csv"), count=3)


def test_questions_of_reasoning_gym() -> None:
    rows, reward = load_questions("reasoning-gym:chain_sum", count=5, shots=1)
    assert len({row["prompt"] for row in rows}) == 5
    assert reward is not None
    for row in rows:
        assert row["wrong_answer"] != row["answer"]
        for_right_solution, for_wrong_solution = (
            reward(["p"], [str(row[name])], entry=[row["entry"]]) for name in ("solution", "wrong_solution")
        )
        assert (for_right_solution, for_wrong_solution) == ([1.0], [0.0])
    assert load_reward("task", reward) is reward


def test_the_solutions_of_a_task_satisfy_its_verifier() -> None:
    task = make_task("chain_sum", questions=6, lines=5, shots=2, seed=0)
    assert len(task.rows) == 6
    assert len(task.lines) == 5
    entries = [row["entry"] for row in task.rows]
    right = [row["solution"].removeprefix(row["prompt"].splitlines()[-1]) for row in task.rows]
    assert task.reward(prompts=[""] * 6, completions=right, entry=entries) == [1.0] * 6
    wrong = ["Answer: 77", "", r"Answer:", right[0] + "1", "no", "7"]
    assert task.reward(prompts=[""] * 6, completions=wrong, entry=entries) == [0.0] * 6


def test_a_dataset_of_conversations_is_told_how_to_make_prompts(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(
        ValueError, match=r"a prompt is the part before the answer, such as {'prompt': row\['messages'\]"
    ):
        load_questions(str(tmp_path / "chat.jsonl"), count=3)


MMLU = [{"question": f"{number} + 2?", "choices": ["0", str(number + 2)], "answer": 1} for number in range(3)]


def saved(tmp_path: Path, kind: str) -> str:
    from datasets import Dataset, DatasetDict

    folder = tmp_path / kind
    folder.mkdir()
    if kind == "folder":
        Dataset.from_list(MMLU).to_parquet(str(folder / "test.parquet"))
    elif kind == "splits":
        DatasetDict({"test": Dataset.from_list(MMLU)}).save_to_disk(str(folder))
    elif kind == "saved":
        Dataset.from_list(MMLU).save_to_disk(str(folder))
    else:
        path = folder / "rows.jsonl"
        Dataset.from_list(MMLU).to_json(str(path))
        return str(path)
    return str(folder)


@pytest.mark.parametrize("kind", ["folder", "splits", "saved", "file"])
def test_datasets_as_they_come(kind: str, tmp_path: Path) -> None:
    rows, reward = load_questions(saved(tmp_path, kind), count=2, split="test", preset="mmlu", chat=True)
    assert [row["answer"] for row in rows] == ["B", "B"]
    assert rows[1]["prompt"][0]["content"].startswith("1 + 2?\n\nA. 0\nB. 3")
    assert reward is not None
    assert reward(["q"] * 2, ["Answer: B", "Answer: A"], answer=["B", "B"]) == [1.0, 0.0]
    columns = {"prompt": "{question}", "answer": "{answer:item of choices}"}
    rows, reward = load_questions(saved(tmp_path / kind, kind), count=1, split="test", columns=columns)
    assert (rows[0]["prompt"], rows[0]["answer"], reward) == ("0 + 2?", "2", None)


def test_names_on_the_hub_have_a_subset_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 7"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = load_questions("openai/gsm8k", count=1, subset="main", split="test[:10]", preset="gsm8k")
    assert rows[0]["answer"] == "7"
    assert asked == [(("openai/gsm8k", "main"), {"split": "test[:10]"})]


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`dataset` is the folder .*, which cannot be read"):
        load_questions(str(tmp_path), count=1)
    with pytest.raises(ValueError, match="it has no split 'train'"):
        load_questions(saved(tmp_path, "splits"), count=1)


def test_rewards_by_rule_check_the_answers() -> None:
    rows = [{"prompt": "q", "answer": "7"}]
    assert load_reward("number", None, rows)(["q"], ["so 7"], answer=["7"]) == [1.0]
    with pytest.raises(ValueError, match="`reward` 'letter' finds no answer in the column 'answer' of row 0"):
        load_reward("letter", None, rows)
