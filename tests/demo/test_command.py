"""What the demo's arguments mean, and which ones it refuses."""

from typing import Any

import pytest

from odp_callbacks.cli.main import main
from odp_callbacks.demo import command
from odp_callbacks.demo.config import DemoConfig


def test_the_command_line_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    refusals = {
        ("--questions", "1"): "`questions` must be an integer of at least 2",
        ("--held_out", "0"): "`held_out`",
        ("--step_length", "-1"): "`step_length` must be a positive number",
        ("--update", "false", "--budget", "100"): "`update` is False",
        ("--budget", "-5"): "`budget`",
        ("--budget", "much"): "--budget",
        ("--questions", "300"): "`questions` and `held_out` are 332 together",
        ("--task", "no_task"): "no_task",
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
    assert main(["demo", "--questions=5", "--rollouts_per_question=3"]) == 0
    config: Any = started[0]
    assert (config.questions, config.probe.rollouts_per_question) == (5, 3)
    assert (config.probe.max_new_tokens, config.probe.budget) == (24, 0), "small enough for two cores"
