"""A reward of your own: TRL's convention, with partial credit, used by the diagnosis without any training.

Run: python examples/custom_reward.py
"""

import re

from peft import LoraConfig, get_peft_model
from rich.console import Console

from odp_callbacks import Teacher, diagnose
from odp_callbacks.cli.models import load_student
from odp_callbacks.visualization.table import summary_table

ROWS = [
    {"prompt": f"7 - 4 = 3.\n5 + 2 = 7.\n{first} + {second} =", "answer": str(first + second)}
    for first, second in ((2, 3), (4, 4), (6, 1))
]


def reward(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """Give 1 for the answer, and 0.5 for a number next to it; columns of the rows are keyword arguments."""
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        number = re.match(r"\s*(\d+)", completion)
        distance = abs(int(number[1]) - int(expected)) if number else None
        rewards.append({0: 1.0, 1: 0.5}.get(distance, 0.0))
    return rewards


model, tokenizer = load_student(None, print)
report = diagnose(
    get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")),
    tokenizer,
    ROWS,
    reward,
    {"answer": Teacher("The answer is {answer}.\n{prompt}")},
    rollouts_per_question=2,
    continuations=2,
    max_new_tokens=6,
    eos_token_ids=tuple(tokenizer("\n")["input_ids"]),
)
Console().print(summary_table(report))
