"""Arguments of ``odp-callbacks diagnose`` for a tiny student, and what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"prompt": prompt, "answer": answer} for prompt, answer in zip(("a b", "c", "b a d", "d c"), "abcd", strict=True)
]


def diagnose_arguments(student_folder: str, dataset: str, output: Path, /, **changes: Any) -> list[str]:
    options = {
        "dataset": dataset,
        "student": student_folder,
        "reward": "odd",
        "questions": 4,
        "output": str(output),
        "lora_rank": 2,
        "teachers": json.dumps({"answer": "{answer} {prompt}", "base": "base"}),
        "measure.rollouts_per_question": 2,
        "measure.max_new_tokens": 4,
        "measure.continuations": 2,
        **changes,
    }
    return ["diagnose", *(f"--{name}={value}" for name, value in options.items())]


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)
