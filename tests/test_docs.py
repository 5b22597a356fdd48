"""The documentation: its code is valid Python, and what it names exists."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import yaml

import odp_callbacks
from odp_callbacks.storage.schema import VERSION

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*PAGES, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))]
MODULES = ROOT / "src" / "odp_callbacks"
DEMO_COMMAND = 'python3 -m venv .venv && .venv/bin/pip install ".[demo]" && .venv/bin/odp-callbacks demo'
TEST_COMMAND = 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest'
WORDS_A_MINUTE = 238
"""Adults who read English non-fiction in silence: Brysbaert, "How many words do we read per minute?", Journal of Memory
and Language 109 (2019)."""
ADDRESS = re.compile(r"\]\([^)]*\)")


def without_code_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_examples_are_python_and_import_existing_names(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("odp_callbacks"):
                exec(f"from {node.module} import {', '.join(alias.name for alias in node.names)}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_files_and_links_exist(document: Path) -> None:
    text = without_code_blocks(document.read_text())
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith(("http", "arXiv")) or (document.parent / target).exists(), target
    for path in re.findall(r"`((?:examples|benchmarks|tests|docs|src)/[\w/.-]+\.\w+)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "document", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda document: document.name
)
def test_modules_of_the_package_exist(document: Path) -> None:
    text = without_code_blocks(document.read_text())
    packages = "|".join(sorted(path.name for path in MODULES.iterdir() if path.is_dir()))
    for path in re.findall(rf"`((?:{packages})/[\w/]+\.py)`", text):
        assert (MODULES / path).exists(), path
    for name in re.findall(r"`odp_callbacks\.([\w.]+)`", text):
        *modules, attribute = name.split(".")
        parent = MODULES.joinpath(*modules)
        exists = any(path.exists() for path in (parent / attribute, parent / f"{attribute}.py"))
        assert exists or name in odp_callbacks.__all__, name


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert yaml.safe_load(text)["strict"] is True
    for page in PAGES:
        assert f": {page.name}" in text, page.name


def test_the_public_names_are_documented() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    for name in odp_callbacks.__all__:
        assert re.search(rf"odp_callbacks\.{name}\b", reference), name


def test_a_name_that_the_search_would_not_find_is_noticed_when_the_site_is_built() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    (path,) = re.findall(r"docs/search_index\.py", config)
    search_index = runpy.run_path(str(ROOT / path))
    (separator,) = re.findall(r"separator: '(.*)'", config)
    names = search_index["public_names"](MODULES)
    assert {*odp_callbacks.__all__, "GatedLoss", "ideal_logit_gradient"} <= {*names}
    titles = [f"<code>odp_callbacks.{name}(first, *, second=&quot;a&quot;)</code>" for name in names[1:]]
    elsewhere = {"location": "method/", "title": names[0]}
    docs = [{"location": f"reference/#{title}", "title": title} for title in titles]
    index = {"config": {"separator": separator}, "docs": [*docs, elsewhere]}
    assert search_index["missing_names"](names, index) == names[:1]
    unsplit = {**index, "config": {"separator": r"[\s\-]+"}}
    assert search_index["missing_names"](names, unsplit) == names, "names are found without their module"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_takes_less_than_five_minutes_to_read(page: Path) -> None:
    shown = ADDRESS.sub("]", page.read_text())
    words = [word for word in shown.split() if any(character.isalnum() for character in word)]  # no bars of tables
    assert len(words) / WORDS_A_MINUTE < 5


def test_the_page_on_records_describes_the_present_format() -> None:
    assert f"## Format, version {VERSION}\n" in (ROOT / "docs" / "records.md").read_text()


def test_every_row_of_the_fault_table_has_a_test_that_exists() -> None:
    pages = [ROOT / "docs" / name for name in ("faults.md", "file-faults.md")]
    rows = [line for page in pages for line in page.read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        *_, cell, _ = row.split(" |")
        if cell.strip() == "test":
            continue
        path, *names = re.findall(r"`([^`]+)`", cell)
        text = (ROOT / path).read_text()
        for name in names:
            assert f"def {name}(" in text, row


def test_the_readme_is_short_and_has_the_commands_on_lines_of_their_own() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert DEMO_COMMAND in lines
    assert TEST_COMMAND in lines


def test_the_readme_installs_extras_that_exist() -> None:
    _, section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")
    extras = re.findall(r"^(\w+) = \[", section.split("\n\n")[0], re.MULTILINE)
    for name in re.findall(r'"\.\[(\w+)\]"', (ROOT / "README.md").read_text()):
        assert name in extras, name
