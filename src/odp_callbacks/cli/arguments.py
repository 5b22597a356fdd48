"""The parser that all commands start from."""

from jsonargparse import ArgumentParser


def command_parser(command: str, description: str) -> ArgumentParser:
    """A parser whose arguments can also be the keys of a YAML file.

    Args:
        command: The command's name.
        description: The first line of its help.
    """
    parser = ArgumentParser(prog=f"odp-callbacks {command}", description=description)
    parser.add_argument("--config", action="config", help="A YAML file with these arguments.")
    return parser


def add_json_argument(parser: ArgumentParser) -> None:
    """Add ``--json``, for commands with a result that a script can read."""
    parser.add_argument("--json", action="store_true", help="Print the result as JSON, and nothing else.")


def add_confidence_argument(parser: ArgumentParser) -> None:
    """Add ``--confidence``."""
    parser.add_argument("--confidence", type=float, default=0.95, help="Level of the intervals. (default: 0.95)")
