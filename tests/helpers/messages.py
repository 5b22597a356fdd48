"""What the library can say in a warning or a log line, read from its source."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

VALUE = "\0"
"""Stands in a message for what is known at run time only."""
PREFIX = "odp-callbacks: "
FEWEST_LETTERS = 10
"""A message with fewer letters of its own passes another message on."""
SINKS = {
    **dict.fromkeys(("warn", "warning", "rank_zero_warn", "warn_once", "_warn_once"), -1),
    **dict.fromkeys(("inform_once", "info", "guarded"), -1),
    **dict.fromkeys(("warn_of_error", "_handle_failure"), -2),  # the exception comes last
}
"""Functions that say something, and which of their positional arguments that is."""
METHOD_SINKS = {"inform": -1}
"""The same for methods: the commands call their own progress lines ``inform`` too."""


@dataclass
class SourceMessages:
    """What the calls of one module say.

    Attributes:
        texts: Messages that stand in the call or in a variable beside it; :data:`VALUE` for values.
        forwarded: Arguments, as source code, whose text comes from elsewhere.
    """

    texts: list[str] = field(default_factory=list)
    forwarded: list[str] = field(default_factory=list)


def messages_of(source: str) -> SourceMessages:
    """Collect what a module says."""
    tree, found = ast.parse(source), SourceMessages()
    for scope, call in _calls(tree, tree):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        place = METHOD_SINKS.get(name) if isinstance(call.func, ast.Attribute) else None
        place = SINKS.get(name, place)
        if place is None or len(call.args) < -place:
            continue
        argument = call.args[place]
        texts = [text for text in _texts(argument, scope, tree) if _letters(text) >= FEWEST_LETTERS]
        found.texts += texts
        if not texts:
            found.forwarded.append(ast.unparse(argument))
    return found


def sentences_in(source: str, name: str) -> list[str]:
    """Collect the sentences that a function or a module's constant holds, without its docstring."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef) and node.name == name
        is_constant = isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets)
        if is_function or is_constant:
            texts = [text for expression in _outermost_texts(node) for text in _texts(expression, node, tree)]
            return [text for text in texts if _letters(text) >= FEWEST_LETTERS and " " in text]
    raise LookupError(name)


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield each module's path below ``root`` and its source."""
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root).as_posix(), path.read_text()


def _calls(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.Call]]:
    """Every call, with the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield scope, child
        yield from _calls(child, child if isinstance(child, ast.FunctionDef) else scope)


def _outermost_texts(node: ast.AST) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        if isinstance(child, ast.JoinedStr) or (isinstance(child, ast.Constant) and isinstance(child.value, str)):
            yield child
        else:
            yield from _outermost_texts(child)


def _texts(expression: ast.expr, scope: ast.AST, tree: ast.AST) -> list[str]:
    """The texts that an expression may be; none if they cannot be read from this module."""
    if isinstance(expression, ast.Constant):
        return [str(expression.value).removeprefix(PREFIX)]
    if isinstance(expression, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else VALUE for part in expression.values]
        return ["".join(parts).removeprefix(PREFIX)]
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
        return _texts(expression.func.value, scope, tree) if expression.func.attr == "format" else []
    if isinstance(expression, ast.Name):
        for where in (scope, tree):
            values = [node.value for node in ast.walk(where) if _assigns(node, expression.id)]
            if values:
                return [text for value in values for text in _texts(value, ast.Module([], []), ast.Module([], []))]
    return []


def _assigns(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.NamedExpr):
        return node.target.id == name
    return isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets)


def _letters(text: str) -> int:
    return sum(character.isalpha() for character in text)
