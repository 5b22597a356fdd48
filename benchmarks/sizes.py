"""The sizes of a benchmark as arguments, with ``--smoke`` for sizes that only show that it runs."""

import argparse
from collections.abc import Mapping
from typing import Any


def size_parser(description: str | None, usual: Mapping[str, Any], smoke: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A parser with one argument for each size.

    Args:
        description: What the benchmark says of itself.
        usual: The sizes of a run whose numbers mean something, by name; a list is an argument with several values.
        smoke: The sizes that ``--smoke`` sets instead, which take seconds.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in usual.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            parser.add_argument(flag, nargs="+", type=type(value[0]), default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value)
    parser.add_argument("--smoke", action=_Smoke, sizes=smoke)
    return parser


class _Smoke(argparse.Action):
    """Sets the sizes when it is read, so that arguments after it can still change them."""

    def __init__(self, *, sizes: Mapping[str, Any], **options: Any) -> None:
        super().__init__(nargs=0, default=False, help="the smallest size: show only that it runs", **options)
        self.sizes = sizes

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        for name, value in self.sizes.items():
            setattr(namespace, name, value)
        setattr(namespace, self.dest, True)


def parse_sizes(description: str | None, usual: Mapping[str, Any], smoke: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that the command line asks for, by name; see :func:`size_parser`."""
    sizes = vars(size_parser(description, usual, smoke).parse_args())
    del sizes["smoke"]
    return sizes
