"""The table, and the checks of the demo's arguments."""

from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from odp_callbacks import Teacher, diagnose
from odp_callbacks.cli.main import main
from odp_callbacks.cli.tasks import make_task
from odp_callbacks.gates import score_rules
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.table import rules_table, summary_table
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.records import MakeReport


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    rows = [{"prompt": p, "answer": a} for p, a in zip(("a b", "d", "c", "e f", "b"), "cabda", strict=True)]

    def reward(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
        return [float(a in c) for c, a in zip(completions, answer, strict=True)]

    teachers = {"answer": Teacher("{answer} {prompt}"), "self": Teacher()}
    return diagnose(tiny("llama").float(), word_tokenizer(), rows, reward, teachers, max_new_tokens=8, continuations=4)


def test_the_table_shows_every_class_with_intervals_in_eighty_columns(report: ProbeReport) -> None:
    out = StringIO()
    Console(file=out, width=80).print(summary_table(report))
    text = out.getvalue()
    for word in (
        "answer",
        "self",
        "correct",
        "incorrect",
        "gap",
        "unclear",
        " to ",
        "answer - self",
        "cannot tell which",
    ):
        assert word in text
    assert "…" not in text


def test_rules_are_ranked_by_predicted_gain_in_eighty_columns(make_report: MakeReport) -> None:
    out = StringIO()
    report = make_report(lambda correct, depth: (-0.4, 0.6) if correct else (0.8, -0.2), noise=0.3)
    Console(file=out, width=80).print(rules_table(score_rules(report)))
    text = out.getvalue()
    assert "…" not in text
    near, far = (text[text.index(name) :] for name in ("near", "far "))
    assert near.index("incorrect rollouts") < near.index("everything") < near.index("correct rollouts", 300)
    assert far.index("correct rollouts") < far.index("everything") < far.index("incorrect rollouts")


def test_no_note_is_cut_off(report: ProbeReport) -> None:
    few = replace(
        report,
        teachers=("answer", "solution"),
        nodes=tuple(replace(n, count=np.ones_like(n.count)) for n in report.nodes),
    )
    out = StringIO()
    Console(file=out, width=80).print(summary_table(few))
    assert "few cont." in out.getvalue()
    assert "…" not in out.getvalue()


def test_the_demo_tasks_own_solutions_satisfy_its_verifier() -> None:
    task = make_task("chain_sum", questions=6, lines=5, shots=2, seed=0)
    assert len(task.rows) == 6
    assert len(task.lines) == 5
    entries = [r["entry"] for r in task.rows]
    right = [r["solution"].removeprefix(r["prompt"].splitlines()[-1]) for r in task.rows]
    assert task.reward(prompts=[""] * 6, completions=right, entry=entries) == [1.0] * 6
    wrong = ["Answer: 77", "", r"Answer:", right[0] + "1", "no", "7"]
    assert task.reward(prompts=[""] * 6, completions=wrong, entry=entries) == [0.0] * 6


def test_the_command_line_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    refusals = {
        ("--steps", "0"): "`steps`",
        ("--probes", "9", "--steps", "2"): "`probes` must be at most",
        ("--budget", "-5"): "`budget`",
        ("--budget", "much"): "--budget",
    }
    for flags, said in refusals.items():
        try:
            code = main(["demo", *flags])
        except SystemExit as stop:  # the parser's own refusal
            code = int(stop.code or 0)
        assert code == 2
        assert said in capsys.readouterr().err
