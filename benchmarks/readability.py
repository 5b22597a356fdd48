"""How readable is the code? Counts that anyone can repeat, today and at another commit.

``python benchmarks/readability.py`` prints modules at the root of the package, the mean length of assigned local names,
the longest function, the time to import the engine beyond torch's own, and the lines of README.
``--compare REVISION`` prints the same counts of that commit beside them (without import times).

Run: python benchmarks/readability.py [--compare REVISION] [--smoke]
"""

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "src/odp_callbacks"
IMPORT_SECONDS = """
import time, torch
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def sources(revision: str | None) -> dict[str, str]:
    """Text of every file that counts, by path; of the working tree, or of a commit."""
    if revision is None:
        paths = [*(ROOT / PACKAGE).rglob("*.py"), ROOT / "README.md"]
        return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in paths}
    listed = _git("ls-tree", "-r", "--name-only", revision).splitlines()
    paths = [path for path in listed if (path.startswith(PACKAGE) and path.endswith(".py")) or path == "README.md"]
    return {path: _git("show", f"{revision}:{path}") for path in paths}


def counts(files: dict[str, str]) -> dict[str, str]:
    """The counts of a set of files."""
    trees = {path: ast.parse(text) for path, text in files.items() if path.endswith(".py")}
    names = [name for tree in trees.values() for name in _local_names(tree)]
    lengths = {
        f"{path.removeprefix(PACKAGE + '/')}:{function.name}": _body_lines(function)
        for path, tree in trees.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
    }
    longest = max(lengths, key=lengths.__getitem__)
    at_root = sum(path.count("/") == PACKAGE.count("/") + 1 for path in trees)
    return {
        "modules at the root": str(at_root),
        "mean length of assigned local names": f"{sum(map(len, names)) / len(names):.2f}",
        "longest function without its docstring": f"{lengths[longest]} lines ({longest})",
        "lines of README": str(len(files["README.md"].splitlines())),
    }


def import_seconds(module: str) -> float:
    """Seconds to import a module in a new process, after torch."""
    code = IMPORT_SECONDS.format(module=module)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _local_names(tree: ast.Module) -> Iterator[str]:
    """Names that statements in functions assign; a comprehension's own variables do not count."""
    inside = {
        id(name)
        for comprehension in ast.walk(tree)
        if isinstance(comprehension, ast.comprehension)
        for name in ast.walk(comprehension.target)
    }
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in inside:
                    yield node.id


def _body_lines(function: ast.FunctionDef) -> int:
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", metavar="REVISION", help="a commit to print beside the working tree")
    parser.add_argument("--smoke", action="store_true", help="the same, as CI runs it")
    arguments = parser.parse_args()
    before = counts(sources(arguments.compare)) if arguments.compare else {}
    for name, value in counts(sources(None)).items():
        print(f"{name}: {before[name] + ' -> ' if before else ''}{value}")
    for module in ("odp_callbacks", "odp_callbacks.records", "odp_callbacks.engine"):
        print(f"seconds to import {module} beyond torch: {min(import_seconds(module) for _ in range(3)):.2f}")


if __name__ == "__main__":
    main()
