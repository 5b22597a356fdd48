"""``odp-callbacks demo``: its arguments."""

import warnings
from collections.abc import Sequence

from rich.console import Console

from odp_callbacks.cli.arguments import command_parser
from odp_callbacks.demo.config import PROBE_DEFAULTS, DemoConfig
from odp_callbacks.demo.run import run_demo
from odp_callbacks.engine.config import ProbeConfig


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of ``odp-callbacks demo``, and run it."""
    parser = command_parser(
        "demo", "See which context helps a real student, and that a step along it keeps the promise."
    )
    parser.add_class_arguments(DemoConfig, skip={"probe"})
    parser.add_class_arguments(ProbeConfig)
    parser.set_defaults(dict(PROBE_DEFAULTS))
    given = parser.parse_args(list(arguments)).as_dict()
    del given["config"]
    probe_options = {name: given.pop(name) for name in ProbeConfig.__dataclass_fields__}
    config = DemoConfig(**given, probe=ProbeConfig(**probe_options))
    with warnings.catch_warnings():
        # peft reads an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        run_demo(config, Console())
    return 0
