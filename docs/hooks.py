"""Formulas of pages and docstrings as MathML, which browsers draw themselves: nothing is loaded from elsewhere."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FENCE = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)
REFERENCE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?(?:odp_callbacks\.)?([\w.]*)</code>")
DIRECTIVE = re.compile(r"<p>\.\. math::\s*(.*?)</p>", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fenced blocks, which GitHub draws too."""
    return FENCE.sub(lambda found: f'<div class="formula">{convert(found[1], display="block")}</div>', markdown)


def on_page_content(content: str, **_: Any) -> str:
    """What docstrings have in reStructuredText."""
    content = REFERENCE.sub(r"<code>\1</code>", content)
    content = ROLE.sub(lambda found: convert(html.unescape(found[1])), content)
    # Markdown has taken pairs of underscores for emphasis.
    plain = re.compile(r"</?em>")
    return DIRECTIVE.sub(lambda found: convert(html.unescape(plain.sub("_", found[1])), display="block"), content)
