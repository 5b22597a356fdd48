"""The command line."""

import argparse
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``odp-callbacks``.

    Args:
        arguments: Of the command line; ``sys.argv`` by default.

    Returns:
        Exit code: 0 when all went well, 1 when the run failed, 2 for a bad argument.
    """
    try:
        from rich.console import Console

        from odp_callbacks.demo.run import DemoConfig, run_demo
    except ImportError as error:
        print(f"the demo needs more packages ({error.name}): pip install 'odp-callbacks[demo]'", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(prog="odp-callbacks", description="Is my teacher helping?")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="distil a real student on two cores and see which teacher helps",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    helps = _attribute_helps(DemoConfig.__doc__ or "")
    hints = typing.get_type_hints(DemoConfig)
    for field in fields(DemoConfig):
        kinds = (hints[field.name], *typing.get_args(hints[field.name]))
        kind = int if int in kinds else str
        assert field.default is not MISSING
        demo.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_optional(kind) if type(None) in kinds else kind,
            default=field.default,
            help=helps[field.name],
        )
    options = vars(parser.parse_args(arguments))
    options.pop("command")
    try:
        config = DemoConfig(**options)
    except ValueError as error:
        demo.error(str(error))
    try:
        run_demo(config, Console())
    except (RuntimeError, ValueError, OSError) as error:
        print(f"odp-callbacks: {error}", file=sys.stderr)
        return 1
    return 0


def _optional(kind: Callable[[str], int | str]) -> Callable[[str], int | str | None]:
    """Parser of a value that can be ``none``."""

    def value(text: str) -> int | str | None:
        return None if text.lower() == "none" else kind(text)

    return value


def _attribute_helps(docstring: str) -> dict[str, str]:
    """Help texts from the ``Attributes:`` of a docstring: each is said once."""
    lines = docstring.partition("Attributes:")[2].strip().splitlines()
    helps: dict[str, str] = {}
    for line in lines:
        name, _, text = line.strip().partition(":")
        helps[name] = text.strip().replace("%", "%%")
    return helps


if __name__ == "__main__":
    sys.exit(main())
