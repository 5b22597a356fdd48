"""The entry point of the command line: it finds a command, and imports nothing for the others."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from odp_callbacks import __version__
from odp_callbacks.text import printable


@dataclass(frozen=True)
class Command:
    """A command of ``odp-callbacks``.

    Attributes:
        summary: What ``odp-callbacks --help`` says about it.
        function: Where it is, as ``"module:function"``; the function takes the arguments after the command's name and
            returns an exit code.
        extra: The extra of this distribution that installs what the command imports.
        after_interruption: What an interrupted user is told about running the command again.
    """

    summary: str
    function: str
    extra: str = "cli"
    after_interruption: str = ""

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the function.

        Raises:
            SystemExit: If a package is missing, with the command that installs it.
        """
        module, _, name = self.function.partition(":")
        try:
            function: Callable[[Sequence[str]], int] = getattr(import_module(module), name)
        except ModuleNotFoundError as missing:
            if (missing.name or "").startswith("odp_callbacks"):
                raise
            raise SystemExit(
                f"This command needs the package {missing.name}, which is not installed: "
                f"pip install 'odp-callbacks[{self.extra}]'"
            ) from None
        return function


COMMANDS = {
    "diagnose": Command(
        "Measure which teacher, or which context, would help a student, without training it.",
        "odp_callbacks.cli.diagnose:run_command",
        after_interruption="; the same command resumes from here",
    ),
    "demonstrations": Command(
        "Sample and verify correct and wrong responses to show to a teacher.",
        "odp_callbacks.cli.demonstrations:run_command",
        after_interruption="; the same command resumes from here",
    ),
    "study": Command(
        "Ask whether the findings of arXiv:2605.10889 hold for several students and tasks.",
        "odp_callbacks.cli.study.command:run_command",
        after_interruption="; the same command resumes from here",
    ),
    "report": Command("Build the HTML report of saved records.", "odp_callbacks.cli.report:run_command"),
    "compare": Command("Compare two runs, or two checkpoints of one run.", "odp_callbacks.cli.compare:run_command"),
    "demo": Command(
        "Distil a real student on two cores and see which teacher helps.",
        "odp_callbacks.demo.command:run_command",
        extra="demo",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``odp-callbacks``.

    Args:
        arguments: The arguments of the command line; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0 for success, 1 if the run failed, 2 for an invalid argument, 130 if it was interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = _command_parser().parse_args(arguments[:1]).command
    command = COMMANDS[name]
    try:
        return command.load()(arguments[1:])
    except ValueError as error:
        print(f"odp-callbacks {name}: {printable(str(error))}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"odp-callbacks {name}: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nodp-callbacks {name}: interrupted{command.after_interruption}.", file=sys.stderr)
        return 130


def _command_parser() -> argparse.ArgumentParser:
    """A parser of the first argument alone: each command parses its own."""
    parser = argparse.ArgumentParser(
        prog="odp-callbacks",
        description="Is my teacher helping? Gradient alignment of on-policy distillation.",
        epilog="Run `odp-callbacks COMMAND --help` for the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"odp-callbacks {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    return parser
