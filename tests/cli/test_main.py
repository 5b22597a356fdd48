"""The entry point: help without heavy imports, and errors as exit codes."""

import subprocess
import sys
import time

import pytest

import odp_callbacks
from odp_callbacks.cli import main as entry_point
from odp_callbacks.cli.main import COMMANDS, Command, main


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "odp_callbacks", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_all_commands_and_imports_nothing_heavy() -> None:
    start = time.perf_counter()
    finished = run_module("--help")
    seconds = time.perf_counter() - start
    assert finished.returncode == 0
    for name, command in COMMANDS.items():
        assert name in finished.stdout
        assert command.summary.split()[0] in finished.stdout
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "odp_callbacks.cli.main" in imported
    assert not imported & {"torch", "numpy", "transformers", "lightning", "jsonargparse", "rich"}
    assert seconds < 10, "1.5 s are promised on an idle machine; here it may be a busy one"


def test_the_version_is_that_of_the_package() -> None:
    finished = run_module("--version")
    assert finished.returncode == 0
    assert finished.stdout.strip() == f"odp-callbacks {odp_callbacks.__version__}"


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["--no-such-flag"]])
def test_without_a_known_command_it_ends_with_2_and_names_the_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: odp-callbacks" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_can_be_imported(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(COMMANDS[name].load())
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert f"odp-callbacks {name}" in capsys.readouterr().out


def test_a_missing_package_is_answered_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    for name in ("arguments", "report"):
        monkeypatch.delitem(sys.modules, f"odp_callbacks.cli.{name}", raising=False)
    with pytest.raises(SystemExit, match=r"jsonargparse, which is not installed: pip install 'odp-callbacks\[cli\]'"):
        main(["report", "records"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("`x` is \x1b[31m[1]"), 2, "odp-callbacks report: `x` is"),
        (RuntimeError("no room"), 1, "odp-callbacks report: no room"),
        (OSError("no disk"), 1, "odp-callbacks report: no disk"),
        (KeyboardInterrupt(), 130, "odp-callbacks report: interrupted."),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(entry_point, "failing_command", fail, raising=False)
    monkeypatch.setitem(COMMANDS, "report", Command("", "odp_callbacks.cli.main:failing_command"))
    assert main(["report"]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "\x1b" not in printed
    assert "\\[" not in printed, "escapes of rich's markup are not for plain text"
