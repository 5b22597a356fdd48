"""The tasks that the demo and the benchmarks train on."""

from odp_callbacks.cli.tasks import make_task


def test_the_demo_tasks_own_solutions_satisfy_its_verifier() -> None:
    task = make_task("chain_sum", questions=6, lines=5, shots=2, seed=0)
    assert len(task.rows) == 6
    assert len(task.lines) == 5
    entries = [row["entry"] for row in task.rows]
    right = [row["solution"].removeprefix(row["prompt"].splitlines()[-1]) for row in task.rows]
    assert task.reward(prompts=[""] * 6, completions=right, entry=entries) == [1.0] * 6
    wrong = ["Answer: 77", "", r"Answer:", right[0] + "1", "no", "7"]
    assert task.reward(prompts=[""] * 6, completions=wrong, entry=entries) == [0.0] * 6
