"""Hooks of the documentation site: they turn formulas into MathML, so that a page loads no script from elsewhere."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FENCED_FORMULA = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
INLINE_FORMULA = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)
CROSS_REFERENCE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?(?:odp_callbacks\.)?([\w.]*)</code>")
FORMULA_DIRECTIVE = re.compile(r"<p>\.\. math::\s*(.*?)</p>", re.DOTALL)
EMPHASIS = re.compile(r"</?em>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Convert the fenced formulas of a page, which GitHub renders too."""

    def convert_block(match: re.Match[str]) -> str:
        return f'<div class="formula">{convert(match[1], display="block")}</div>'

    return FENCED_FORMULA.sub(convert_block, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Convert what docstrings write in reStructuredText: cross-references and formulas."""

    def convert_inline(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]))

    def convert_directive(match: re.Match[str]) -> str:
        # Markdown has read pairs of underscores as emphasis.
        return convert(html.unescape(EMPHASIS.sub("_", match[1])), display="block")

    content = CROSS_REFERENCE.sub(r"<code>\1</code>", content)
    content = INLINE_FORMULA.sub(convert_inline, content)
    return FORMULA_DIRECTIVE.sub(convert_directive, content)
