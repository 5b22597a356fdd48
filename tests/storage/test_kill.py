"""The benchmark that kills processes while they write finds nothing lost and nothing half read."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_processes_that_are_killed_lose_nothing() -> None:
    command = [sys.executable, "benchmarks/kill.py", "--kills", "60"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [line.split("|") for line in finished.stdout.splitlines()[-5:]]
    assert [(row[2].strip(), row[4].strip(), row[5].strip()) for row in rows] == [("60", "0", "0")] * 5
