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
