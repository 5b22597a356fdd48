"""Questions of a reasoning-gym task as few-shot prompts, with the task's exact verifier."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction

EASY_SETTINGS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
"""Settings of tasks under which SmolLM2-135M-Instruct sometimes succeeds and sometimes fails."""

ANSWER_MARK = "Answer:"
"""What precedes an answer in a worked line."""


@dataclass(frozen=True)
class Task:
    """Questions of one reasoning-gym task.

    Attributes:
        rows: Questions for the student, with the columns ``prompt``, ``solution`` (a worked line), ``answer`` and
            ``entry`` (what the verifier reads, as JSON).
        lines: Worked lines of other questions, on which a teacher can be fine-tuned.
        reward: The verifier.
    """

    rows: list[Row]
    lines: list[str]
    reward: RewardFunction


def make_task(
    name: str, *, questions: int, lines: int, shots: int, seed: int, settings: Mapping[str, Any] | None = None
) -> Task:
    """Make the questions of a task.

    Solved examples, questions and lines for fine-tuning are different items of one seeded stream.

    Args:
        name: A reasoning-gym dataset, such as ``"chain_sum"``.
        questions: How many rows to make.
        lines: How many worked lines to make.
        shots: How many solved examples each prompt starts with.
        seed: The seed of the stream.
        settings: Settings of the reasoning-gym dataset; None for those of :data:`EASY_SETTINGS`, if there are any.
    """
    options = EASY_SETTINGS.get(name, {}) if settings is None else settings
    dataset = reasoning_gym.create_dataset(name, size=shots + questions + lines, seed=seed, **options)
    entries = [dataset[entry_index] for entry_index in range(len(dataset))]
    worked_lines = [_question(entry) + _solution(entry) for entry in entries]
    examples = "\n".join(worked_lines[:shots]) + "\n" if shots else ""
    rows: list[Row] = [
        {
            "prompt": examples + _question(entry),
            "solution": worked_line,
            "answer": entry["answer"],
            "entry": json.dumps({"question": entry["question"], "answer": entry["answer"]}),
        }
        for entry, worked_line in zip(entries[shots : shots + questions], worked_lines[shots:], strict=False)
    ]
    return Task(rows, worked_lines[shots + questions :], _verifier(dataset.score_answer))


def _question(entry: dict[str, Any]) -> str:
    expression = entry["metadata"].get("expression")
    return f"{expression} = ?" if expression else " ".join(entry["question"].split())


def _solution(entry: dict[str, Any]) -> str:
    expression = entry["metadata"].get("expression")
    calculation = f" {expression} = {entry['answer']}." if expression else ""
    return f"{calculation} {ANSWER_MARK} {entry['answer']}"


def _verifier(score_answer: Callable[..., float]) -> RewardFunction:
    def reward(prompts: list[str], completions: list[str], entry: list[str]) -> list[float]:
        """Give 1 where the text after the last "Answer:" is exactly right, else 0."""
        answers = [
            completion.rpartition(ANSWER_MARK)[2].strip() if ANSWER_MARK in completion else None
            for completion in completions
        ]
        return [
            float(score_answer(answer, entry=json.loads(encoded)) >= 1)
            for answer, encoded in zip(answers, entry, strict=True)
        ]

    return reward
