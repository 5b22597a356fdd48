"""Whatever is imported is declared in pyproject.toml, in the extra that needs it."""

import ast
import re
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

import odp_callbacks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DISTRIBUTIONS = packages_distributions()
BASE = "(none)"
EXTRAS_OF = {
    "cli/": {"cli"},
    "demo/": {"demo"},
    "visualization/": {"report"},
    "visualization/tensorboard": {"tensorboard"},
    "visualization/table": {"cli"},
}
"""Which extras' packages files may import, by how their paths begin; all others import what is always installed."""
CHOSEN_BY_THE_USER = {
    "bitsandbytes": "recognised where the user's model has its layers",
    "deepspeed": "recognised where the user's trainer has partitioned parameters by it",
    "math_verify": "the reward `math-verify`; without it, the error names the extra `math`",
    "matplotlib": "ProbeReport.plot; without it, the error names the extra `report`",
    "pandas": "ProbeReport.to_pandas",
    "reasoning_gym": "questions of a task; without it, the error names the extra `demo`",
    "rich": "the progress bar of users who chose Lightning's rich one",
    "triton": "comes with torch for CUDA; without it, attention goes on by blocks",
    "trl": "recognised where the user trains with it",
    "vllm": "an engine in the process, which the user made with it",
}
"""Packages that the library imports only where their absence is handled, and why."""


ELSEWHERE = {"accelerate", "deepspeed", "pytorch_lightning", "vllm"}
"""What another declared package brings along, and what tests import in an environment of its own."""


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirements(extra: str = BASE) -> set[str]:
    """Distributions that an extra installs, with those of the extras that it names."""
    listed = PROJECT["dependencies"] if extra == BASE else PROJECT["optional-dependencies"][extra]
    found = set()
    for requirement in listed:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        if normalised(name) == "odp-callbacks":
            found |= {part for inner in extras.split(",") for part in requirements(inner)}
        else:
            found.add(normalised(name))
    return found if extra == BASE else found | requirements()


def imported_packages(path: Path) -> set[str]:
    """Packages that a file imports, at any depth, without those of the standard library and its neighbours."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    # Scripts, unlike modules of the package, import the files beside them by their bare names.
    scripts = set() if (path.parent / "__init__.py").exists() else {script.stem for script in path.parent.glob("*.py")}
    return names - set(sys.stdlib_module_names) - scripts - {"odp_callbacks", "tests"}


def undeclared(path: Path, declared: set[str], exempt: set[str] = frozenset()) -> list[str]:
    return sorted(
        package
        for package in imported_packages(path) - exempt
        if not declared & {normalised(name) for name in DISTRIBUTIONS.get(package, [package])}
    )


def extras_of(path: Path) -> set[str]:
    relative = path.relative_to(ROOT / "src" / "odp_callbacks").as_posix()
    matching = [prefix for prefix in EXTRAS_OF if relative.startswith(prefix)]
    return EXTRAS_OF[max(matching, key=len)] if matching else set()


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_the_library_imports_is_declared(path: Path) -> None:
    declared = requirements().union(*(requirements(extra) for extra in extras_of(path)))
    assert not undeclared(path, declared, set(CHOSEN_BY_THE_USER)), f"declare it in {extras_of(path) or 'dependencies'}"


@pytest.mark.parametrize(
    ("folder", "extra"), [("tests", "test"), ("examples", "test"), ("benchmarks", "test"), ("docs", "dev")]
)
def test_what_the_repository_imports_is_declared(folder: str, extra: str) -> None:
    missing = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (names := undeclared(path, requirements(extra), ELSEWHERE))
    }
    assert not missing, f"declare it in the extra {extra}"


def test_every_declared_dependency_is_used() -> None:
    """Directly, or by a package that asks for it: those are named here."""
    indirect = {"gguf": "transformers", "tensorboard": "torch.utils.tensorboard"}
    imported = {
        normalised(distribution)
        for path in (ROOT / "src").rglob("*.py")
        for package in imported_packages(path)
        for distribution in DISTRIBUTIONS.get(package, [])
    }
    for extra in (BASE, "tensorboard", "report", "math", "cli", "demo"):
        assert requirements(extra) - imported - set(indirect) == set(), extra


@pytest.mark.parametrize("extra", ["tensorboard", "report", "math", "cli", "demo"])
def test_what_an_extra_installs_is_installed_where_the_tests_run(extra: str) -> None:
    """A documented reward was never tried with the package that it needs, which no extra installed."""
    assert requirements(extra) <= requirements("test")
    for distribution in requirements(extra):
        assert version(distribution)


def test_an_error_names_the_extra_that_installs_what_is_missing() -> None:
    named = {
        (path.name, extra)
        for path in [*(ROOT / "src").rglob("*.py"), ROOT / "README.md"]
        for extra in re.findall(r"odp-callbacks\[(\w+)\]|\"\.\[(\w+)\]\"", path.read_text("utf-8"))
        for extra in extra
        if extra
    }
    assert {extra for _, extra in named} <= set(PROJECT["optional-dependencies"])
    assert ("rewards.py", "math") in named


def test_exemptions_are_still_needed() -> None:
    sources = sorted((ROOT / "src").rglob("*.py"))
    imported = set().union(*map(imported_packages, sources))
    assert set(CHOSEN_BY_THE_USER) <= imported
    for prefix in EXTRAS_OF:
        assert any(path.relative_to(ROOT / "src" / "odp_callbacks").as_posix().startswith(prefix) for path in sources)


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", odp_callbacks.__version__)
    assert "version" not in PROJECT
    assert f"\nversion: {odp_callbacks.__version__}" not in (ROOT / "CITATION.cff").read_text("utf-8")


def test_an_undeclared_import_is_noticed(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import json\nimport numpy\n\ndef f():\n    from selenium import webdriver\n")
    assert undeclared(module, requirements()) == ["selenium"]
    assert undeclared(module, requirements("test")) == []
