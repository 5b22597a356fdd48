"""Imports point downwards only."""

import ast
from pathlib import Path

import pytest

import odp_callbacks

ROOT = Path(odp_callbacks.__file__).parent
TRAINERS = {"lightning", "pytorch_lightning", "torchmetrics", "trl", "matplotlib", "tensorboard"}
ALLOWED = {
    "functional": {"functional"},
    "engine": {"engine", "functional", "records", "evidence", "success_model", "figures", "text"},
    "records.py": set(),
    "evidence.py": {"records"},
    "success_model.py": {"evidence", "records"},
    "inference.py": {"records"},
    "estimates.py": {"evidence", "records"},
    "correction.py": {"evidence", "records", "success_model"},
    "figures.py": {"correction", "estimates", "evidence", "inference", "records"},
    "text.py": set(),
    "certainty.py": {"evidence", "records", "success_model"},
    "summaries.py": {
        "certainty",
        "correction",
        "estimates",
        "evidence",
        "figures",
        "inference",
        "records",
        "success_model",
    },
}
SOURCES = [(part, path) for part in ALLOWED for path in (sorted((ROOT / part).glob("*.py")) or [ROOT / part])]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module


@pytest.mark.parametrize(("part", "path"), SOURCES, ids=[str(path.relative_to(ROOT)) for _, path in SOURCES])
def test_imports(part, path):
    for name in imports(path):
        first, *rest = name.split(".")
        assert first not in TRAINERS
        if first == "odp_callbacks":
            assert rest, f"{path} imports the package as a whole"
            assert rest[0] in ALLOWED[part]
        if part.endswith(".py"):
            assert first not in {"torch", "transformers", "peft"}, "records and figures need no model"


def test_the_monitor_knows_no_trainer():
    names = list(imports(ROOT / "monitor.py"))
    assert not {name.split(".")[0] for name in names} & (TRAINERS | {"lightning_utilities", "transformers"})
    parts = {name.split(".")[1] for name in names if name.startswith("odp_callbacks.")}
    assert parts == {"engine", "geometry", "overhead", "processes", "records", "storage", "summaries"}


@pytest.mark.parametrize(
    ("face", "stranger"), [("callback", "trl"), ("trainer_callback", "lightning"), ("trl_gate", "lightning")]
)
def test_a_trainer_s_layer_knows_its_own_trainer_only(face, stranger):
    assert not any(name.split(".")[0].startswith(stranger) for name in imports(ROOT / f"{face}.py"))


def test_every_part_was_found():
    assert len(SOURCES) > len(ALLOWED) + 10
