"""Every benchmark is listed, and has a smoke size that CI runs (``nox -s benchmarks``)."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if 'if __name__ == "__main__"' in path.read_text("utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_benchmark_is_listed_and_has_a_smoke_size(script: Path) -> None:
    text = script.read_text("utf-8")
    assert f"`python benchmarks/{script.name}`" in (FOLDER / "README.md").read_text("utf-8")
    assert "SMOKE" in text or "--smoke" in text
    assert text.startswith('"""')
    assert f"\nRun: python benchmarks/{script.name}" in text


@pytest.mark.slow
def test_the_comparison_for_gpus_runs_on_a_tiny_student_wherever_it_is() -> None:
    command = [sys.executable, str(FOLDER / "gpu" / "compare.py"), "--smoke", "--repeats", "1"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "4 slots: 4 rows are the same when replayed" in finished.stdout


@pytest.mark.slow
def test_the_validation_for_gpus_runs_on_a_tiny_student_wherever_it_is() -> None:
    """What is prepared for a machine with a GPU must not fail there for a reason that shows on any machine."""
    command = [sys.executable, str(FOLDER / "gpu" / "validate.py"), "--smoke"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "few calls, sdpa: used" in finished.stdout
    assert "three steps end in the same bits: True" in finished.stdout
