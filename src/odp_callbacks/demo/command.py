"""``odp-callbacks demo``: its arguments."""

from collections.abc import Sequence

from rich.console import Console

from odp_callbacks.cli.arguments import command_parser
from odp_callbacks.demo.run import DemoConfig, run_demo
from odp_callbacks.engine.config import ProbeConfig

PROBE_DEFAULTS = {
    "rollouts_per_question": 2,
    "max_new_tokens": 20,
    "budget": 3000,
    "max_branches": 3,
    "tail_draws": 1,
}
"""Options of a probe that is small enough for two cores."""


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of ``odp-callbacks demo``, and run it."""
    parser = command_parser("demo", "Distil a real student on two cores and see which teacher helps.")
    parser.add_class_arguments(DemoConfig, skip={"probe"})
    parser.add_class_arguments(ProbeConfig)
    parser.set_defaults(PROBE_DEFAULTS)
    given = parser.parse_args(list(arguments)).as_dict()
    del given["config"]
    probe_options = {name: given.pop(name) for name in ProbeConfig.__dataclass_fields__}
    run_demo(DemoConfig(**given, probe=ProbeConfig(**probe_options)), Console())
    return 0
