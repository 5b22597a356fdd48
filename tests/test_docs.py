"""The documentation: its code is Python, and what it names is there."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import odp_callbacks

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_examples_are_python_and_import_what_there_is(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("odp_callbacks"):
                exec(f"from {node.module} import {', '.join(a.name for a in node.names)}")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_files_and_links_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith(("http", "arXiv")) or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:examples|benchmarks|tests)/[\w/.-]+\.\w+)", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert yaml.safe_load(text)["strict"] is True
    for page in PAGES:
        assert f": {page.name}" in text, page.name


def test_the_public_names_are_documented() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    for name in odp_callbacks.__all__:
        assert f"odp_callbacks.{name}" in reference, name
