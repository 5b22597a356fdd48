"""Imports point downwards only."""

import ast
from pathlib import Path

import pytest

import odp_callbacks

ROOT = Path(odp_callbacks.__file__).parent
TRAINERS = {"lightning", "pytorch_lightning", "lightning_utilities", "trl"}
DRAWING = {"matplotlib", "tensorboard", "jinja2", "rich"}
MODELS = {"torch", "transformers", "peft"}

LAYERS = [
    {"files", "text", "records", "update_records", "functional"},
    {"analysis"},
    {"engine"},
    {"storage", "gates", "metrics"},
    {"visualization", "distillation"},
    {"callbacks"},
    {"cli"},
    {"demo"},
]
"""From the bottom; a module imports from its own layer's packages and from those below."""
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
STRANGERS = {
    "files": TRAINERS | DRAWING | MODELS,
    "text": TRAINERS | DRAWING | MODELS,
    "records": TRAINERS | DRAWING | MODELS,
    "update_records": TRAINERS | DRAWING | MODELS,
    "functional": TRAINERS | DRAWING,
    "analysis": TRAINERS | DRAWING | MODELS,
    "engine": TRAINERS | DRAWING,
    "storage": TRAINERS | DRAWING | MODELS,
    "gates": {"lightning", "pytorch_lightning", "lightning_utilities"} | DRAWING,
    "visualization": TRAINERS | {"transformers", "peft"},
}
SOURCES = [
    path for path in sorted(ROOT.rglob("*.py")) if path.name not in {"__main__.py"} and path != ROOT / "__init__.py"
]
FACADE = {"records.py": "the methods of ProbeReport are shortcuts to what lies above"}
"""Whose functions may import upwards, and why."""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, *, inside_functions: bool = True) -> list[str]:
    tree = ast.parse(path.read_text())
    hidden = set()
    if not inside_functions:
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        hidden = {id(inner) for outer in [*functions, *guarded] for inner in ast.walk(outer)}
    found = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if [alias.name for alias in node.names] == ["__version__"]:
                continue
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    for name in imports(path, inside_functions=path.name not in FACADE):
        first, *rest = name.split(".")
        assert first not in STRANGERS.get(part, set()), f"{part} does not know {first}"
        if first == "odp_callbacks":
            assert rest, f"{path} imports the package as a whole"
            assert HEIGHT[rest[0]] <= HEIGHT[part], f"{part} is below {rest[0]}"


@pytest.mark.parametrize(
    ("path", "stranger"),
    [
        ("callbacks/monitor.py", "lightning"),
        ("callbacks/monitor.py", "transformers"),
        ("callbacks/lightning.py", "trl"),
        ("callbacks/transformers.py", "lightning"),
        ("gates/trl.py", "lightning"),
    ],
)
def test_the_face_of_one_trainer_does_not_know_another(path: str, stranger: str) -> None:
    assert not any(name.split(".")[0].startswith(stranger) for name in imports(ROOT / path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_production_does_not_import_the_demonstration(path: Path) -> None:
    if part_of(path) not in {"demo", "cli"}:
        assert not any(name.startswith("odp_callbacks.demo") for name in imports(path))


def test_every_package_has_its_place_in_the_layers() -> None:
    assert {part_of(path) for path in SOURCES} <= set(HEIGHT)


def test_an_upward_import_is_noticed(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import sys\n\ndef f():\n    from odp_callbacks.cli import main\n")
    assert imports(module) == ["sys", "odp_callbacks.cli"]
    assert imports(module, inside_functions=False) == ["sys"]


def test_each_arrow_between_files_of_a_package_has_one_direction() -> None:
    graph = {
        "odp_callbacks." + ".".join(path.relative_to(ROOT).with_suffix("").parts): {
            name for name in imports(path, inside_functions=False) if name.startswith("odp_callbacks.")
        }
        for path in SOURCES
    }

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    assert not [name for name in graph if name in reachable(name)], "a circle of imports"
