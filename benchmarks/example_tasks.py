"""The tasks and contexts of examples/diagnose, for the benchmarks that compare figures on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from odp_callbacks.cli.datasets import load_questions
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction

FOLDER = Path(__file__).parent.parent / "examples" / "diagnose"
TASKS = ("chain_sum", "products")


@dataclass(frozen=True)
class ExampleTask:
    """One file of examples/diagnose.

    Attributes:
        name: ``"chain_sum"`` or ``"products"``.
        rows: Different questions.
        reward: The task's verifier.
        contexts: The teachers' contexts by name.
        usual_questions: The number of questions in the file.
        measure: The file's options of a probe.
    """

    name: str
    rows: list[Row]
    reward: RewardFunction
    contexts: dict[str, str]
    usual_questions: int
    measure: dict[str, Any]


def example_task(name: str, questions: int, seed: int, contexts: int) -> ExampleTask:
    """Read the file of a task and make its first questions; more questions begin with the same ones.

    Args:
        name: One of :data:`TASKS`.
        questions: How many different questions to make.
        seed: Of the questions.
        contexts: How many of the file's contexts to take.
    """
    settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    rows, reward = load_questions(settings["dataset"], count=questions, seed=seed, settings=settings.get("settings"))
    if reward is None or len(rows) < questions:
        raise ValueError(f"`questions` is {questions}, but the task {name} has only {len(rows)} different ones.")
    chosen = dict(list(settings["teachers"].items())[:contexts])
    return ExampleTask(name, rows, reward, chosen, settings["questions"], settings["measure"])
