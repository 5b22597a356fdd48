"""What a probe says while it works."""

import io
from contextlib import redirect_stderr

from odp_callbacks.progress import ProbeProgress


def told(shown: bool) -> tuple[list[str], str]:
    now, lines, screen = [0.0], [], io.StringIO()
    with redirect_stderr(screen), ProbeProgress(shown, lines.append, lambda: now[0]) as report:
        for second in range(101):
            now[0] = float(second)
            report("continuations", second, 100)
        report("gradients", 0, 4)
    return lines, screen.getvalue()


def test_a_log_gets_a_line_every_half_minute_with_the_time_left() -> None:
    lines, screen = told(False)
    assert screen == ""
    assert len(lines) == 3
    assert lines[0] == ("odp-callbacks: probe, continuations 30 of 100, 30 s so far, continuations done in about 70 s")


def test_a_bar_shows_stage_and_time_left_and_goes() -> None:
    lines, screen = told(True)
    assert not lines
    assert "probe: continuations 30/100" in screen
    assert "done in about 70 s" in screen
    assert screen.rstrip(" \r\n").endswith("\r") or screen.endswith("\r")
