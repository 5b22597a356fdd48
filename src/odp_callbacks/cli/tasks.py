"""The demo's questions: a reasoning-gym task as few-shot prompts, with its exact verifier."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction

EASY: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
"""Settings under which the demo's student sometimes succeeds and sometimes fails."""

ANSWER = "Answer:"


@dataclass(frozen=True)
class Task:
    """Questions of one reasoning-gym task.

    Attributes:
        rows: For the student, with columns ``prompt``, ``solution`` (a worked line), ``answer``, ``entry`` (JSON).
        lines: Worked lines of other questions, to fine-tune a teacher on.
        reward: The verifier.
    """

    rows: list[Row]
    lines: list[str]
    reward: RewardFunction


def make_task(
    name: str, *, questions: int, lines: int, shots: int, seed: int, settings: Mapping[str, Any] | None = None
) -> Task:
    """Make questions; shots, fine-tuning lines and questions are different items of one seeded stream.

    Args:
        name: A reasoning-gym dataset, such as ``"chain_sum"``.
        questions: How many rows.
        lines: How many worked lines for fine-tuning.
        shots: Solved examples in each prompt.
        seed: Of the questions.
        settings: Of the reasoning-gym dataset; None for :data:`EASY` ones, where there are any.
    """
    options = EASY.get(name, {}) if settings is None else settings
    dataset = reasoning_gym.create_dataset(name, size=shots + questions + lines, seed=seed, **options)
    entries = [dataset[i] for i in range(len(dataset))]
    solved = [_question(e) + _solution(e) for e in entries]
    head = "\n".join(solved[:shots]) + "\n" if shots else ""
    rows: list[Row] = [
        {
            "prompt": head + _question(e),
            "solution": line,
            "answer": e["answer"],
            "entry": json.dumps({"question": e["question"], "answer": e["answer"]}),
        }
        for e, line in zip(entries[shots : shots + questions], solved[shots:], strict=False)
    ]
    return Task(rows, solved[shots + questions :], _verifier(dataset.score_answer))


def _question(entry: dict[str, Any]) -> str:
    expression = entry["metadata"].get("expression")
    return f"{expression} = ?" if expression else " ".join(entry["question"].split())


def _solution(entry: dict[str, Any]) -> str:
    expression = entry["metadata"].get("expression")
    worked = f" {expression} = {entry['answer']}." if expression else ""
    return f"{worked} {ANSWER} {entry['answer']}"


def _verifier(score_answer: Callable[..., float]) -> RewardFunction:
    def reward(prompts: list[str], completions: list[str], entry: list[str]) -> list[float]:
        """1 where the text after the last "Answer:" is exactly right, else 0."""
        given = [c.rpartition(ANSWER)[2].strip() if ANSWER in c else None for c in completions]
        return [float(score_answer(g, entry=json.loads(e)) >= 1) for g, e in zip(given, entry, strict=True)]

    return reward
