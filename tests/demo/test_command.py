"""What the demo's arguments mean, and which ones it refuses."""

from typing import Any

import pytest

from odp_callbacks.cli.main import main
from odp_callbacks.demo import command
from odp_callbacks.demo.run import DemoConfig


def test_the_command_line_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    refusals = {
        ("--steps", "0"): "`steps`",
        ("--probes", "9", "--steps", "2"): "`probes` must be at most",
        ("--budget", "-5"): "`budget`",
        ("--budget", "much"): "--budget",
    }
    for flags, message in refusals.items():
        try:
            code = main(["demo", *flags])
        except SystemExit as stop:  # the parser's own refusal
            code = int(stop.code or 0)
        assert code == 2
        assert message in capsys.readouterr().err


def test_options_of_a_probe_are_arguments_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[DemoConfig] = []
    monkeypatch.setattr(command, "run_demo", lambda config, console: started.append(config))
    assert main(["demo", "--steps=2", "--budget=200", "--nodes=every"]) == 0
    config: Any = started[0]
    assert (config.steps, config.probe.budget, config.probe.nodes) == (2, 200, "every")
    assert (config.probe.max_new_tokens, config.probe.max_branches) == (20, 3), "small enough for two cores"
