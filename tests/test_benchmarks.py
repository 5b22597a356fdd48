"""Every benchmark is listed, and has a smoke size that CI runs (``nox -s benchmarks``)."""

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
