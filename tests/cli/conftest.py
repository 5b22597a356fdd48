"""A tiny student in a folder, questions in a file, and a reward that can interrupt a diagnosis."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from odp_callbacks.cli import rewards
from tests.helpers.command_line import ROWS
from tests.helpers.models import tiny_base, word_tokenizer


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student")
    tiny_base("llama").float().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(path)


class OddLengthReward:
    """Gives 1 for responses with an odd number of words, counts its calls, and can interrupt after some of them."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.interrupt_after: int | None = None

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        self.calls.append(len(completions))
        in_main_thread = threading.current_thread() is threading.main_thread()  # only there Ctrl-C arrives
        if self.interrupt_after is not None and len(self.calls) > self.interrupt_after and in_main_thread:
            raise KeyboardInterrupt
        return [float(len(completion.split()) % 2) for completion in completions]


@pytest.fixture(autouse=True)
def odd_reward(monkeypatch: pytest.MonkeyPatch) -> OddLengthReward:
    """The reward that the tests' commands name ``odd``."""
    reward = OddLengthReward()
    monkeypatch.setitem(rewards.REWARDS, "odd", reward)
    return reward
