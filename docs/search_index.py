"""Hook of the documentation site: building it fails unless its search finds every public name in the reference."""

import ast
import html
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent / "src" / "odp_callbacks"
MARKUP = re.compile(r"<[^>]+>")


def on_post_build(config: Mapping[str, Any], **_: Any) -> None:
    """Check the index that the search plugin has written."""
    index = json.loads((Path(config["site_dir"]) / "search" / "search_index.json").read_text("utf-8"))
    if missing := missing_names(public_names(PACKAGE), index):
        raise SystemExit(f"The search of the site does not find {', '.join(missing)}; add them to docs/reference.md.")


def public_names(package: Path) -> list[str]:
    """Every name in an ``__all__`` of the package, sorted."""
    names: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= set(ast.literal_eval(node.value))
    return sorted(names)


def missing_names(names: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    """The names that are no word of any title of the reference.

    Args:
        names: Public names.
        index: What the search plugin writes: ``docs`` with ``location`` and ``title``, and ``config`` with the
            ``separator`` of words.
    """
    separator = index["config"]["separator"]
    words = {
        word
        for entry in index["docs"]
        if entry["location"].startswith("reference/")
        for word in re.split(separator, html.unescape(MARKUP.sub(" ", entry["title"])))
    }
    return [name for name in names if name not in words]
