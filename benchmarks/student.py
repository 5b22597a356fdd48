"""The student that the benchmarks share: SmolLM2-135M-Instruct with LoRA, as the demo loads it."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import Task, make_task
from odp_callbacks.engine.prompts import Row


def lora_student(device: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The student in evaluation mode, on the accelerator if there is one."""
    student, _ = student_and_tokenizer()
    return student.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)


def student_and_tokenizer(lora_alpha: int = 8) -> tuple[Any, Any]:
    """The student in evaluation mode, on the CPU, and its tokenizer."""
    model, tokenizer = load_student(None, print)
    lora = LoraConfig(r=8, lora_alpha=lora_alpha, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).eval(), tokenizer


def end_of_line(tokenizer: Any) -> tuple[int, ...]:
    """The token that ends a line, which also ends responses to few-shot prompts."""
    return tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])


def sums(questions: int, seed: int, lines: int = 0) -> tuple[Task, Sequence[Row]]:
    """A task of one-digit sums, and its first rows that are different."""
    task = make_task("chain_sum", questions=4 * questions, lines=lines, shots=2, seed=seed)
    return task, list({row["prompt"]: row for row in task.rows}.values())[:questions]
