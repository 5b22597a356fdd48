"""The whole demo on a tiny student, from the command to what it prints and leaves behind."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from odp_callbacks import ProbeReport
from odp_callbacks.demo import run
from odp_callbacks.demo.config import TEACHERS, DemoConfig
from odp_callbacks.demo.results import DemoResults
from odp_callbacks.engine.config import ProbeConfig
from tests.helpers.models import LETTERS, tiny_base, word_tokenizer
from tests.helpers.tensorboard import read_runs


def first_word_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float("a" in completion.split()[:2]) for completion in completions]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResults, str, Path]:
    """The demo with questions that a tiny tokenizer knows."""
    folder = tmp_path_factory.mktemp("demo")
    tiny_base("llama").float().save_pretrained(folder / "student")
    word_tokenizer().save_pretrained(folder / "student")
    rows = [
        {"prompt": f"{first} {second}", "solution": "a a a", "answer": "a", "wrong_answer": "f"}
        for first in LETTERS[:6]
        for second in LETTERS[:4]
    ]
    config = DemoConfig(
        model=str(folder / "student"),
        questions=12,
        held_out=12,
        held_out_responses=4,
        output=str(folder / "out"),
        probe=ProbeConfig(budget=0, max_new_tokens=6),
    )
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_rows", lambda config: (rows, first_word_reward))
        patch.setattr(run, "END_OF_LINE", "f")
        results = run.run_demo(config, Console(file=printed, width=100))
    return results, printed.getvalue(), folder / "out"


def test_every_stage_is_announced_before_the_answer(demo: tuple[DemoResults, str, Path]) -> None:
    _, printed, _ = demo
    stages = re.findall(r"^(.*), about \d+ s left$", printed, re.MULTILINE)
    assert [stage for stage in stages if stage != "scoring responses"] == [
        run.SAMPLING,
        run.UPDATE,
        run.BEFORE,
        *map(run.step_stage, TEACHERS),
    ]


def test_the_answer_and_both_sides_of_every_step_are_printed(demo: tuple[DemoResults, str, Path]) -> None:
    results, printed, _ = demo
    assert " ".join(results.advice.split()) in " ".join(printed.split())
    assert set(results.after) == set(results.gains) == set(TEACHERS)
    for gain in results.gains.values():
        assert f"{gain.before.value:.1%} → {gain.after.value:.1%}" in printed
        assert f"{100 * gain.change.value:+.1f}" in printed
    assert "(control)" in printed
    assert max(map(len, printed.replace("\n\n", "\n").splitlines()[:-2])) <= 100 or "pinnedCards" in printed


def test_measured_and_held_out_questions_are_different(demo: tuple[DemoResults, str, Path]) -> None:
    results, _, _ = demo
    assert {rollout.question for rollout in results.report.rollouts} == {str(number) for number in range(12)}
    assert results.before.shape == (12,)


def test_records_report_and_curves_are_left_behind(demo: tuple[DemoResults, str, Path]) -> None:
    results, printed, output = demo
    assert ProbeReport.load(output / "records" / "demo").teachers == tuple(TEACHERS)
    assert (output / "report.html").stat().st_size > 10_000
    assert "http://localhost:6006/?pinnedCards=" in printed
    runs = {Path(name).name: scalars for name, scalars in read_runs(output).items()}
    for teacher in TEACHERS:
        gain = results.gains[teacher]
        curve = runs[teacher]["odp/held_out_success"]
        assert dict(curve) == pytest.approx({0: gain.before.value, 1: gain.after.value})
        assert len({value for _, value in curve}) == 2
        of_probe = runs[teacher]["odp/update_gain"]
        assert [step for step, _ in of_probe] == [0, 1]
        assert of_probe[0][1] == of_probe[1][1] == pytest.approx(gain.predicted.value / results.length)


def test_a_task_without_enough_questions_is_refused(tmp_path: Path) -> None:
    config = DemoConfig(task="products", questions=200, held_out=200, output=str(tmp_path))
    with pytest.raises(ValueError, match=r"has only \d+ different questions; ask for fewer"):
        run.load_rows(config)


def test_the_seed_chooses_questions_and_leaves_the_examples_alone(tmp_path: Path) -> None:
    def prompts(seed: int) -> list[list[str]]:
        rows, _ = run.load_rows(DemoConfig(seed=seed, output=str(tmp_path)))
        return [str(row["prompt"]).rsplit("\n", 1) for row in rows]

    first, again, other = prompts(0), prompts(0), prompts(1)
    assert first == again != other
    assert len({question for _, question in first}) == len(first) == DemoConfig().questions + DemoConfig().held_out
    assert len({examples for examples, _ in first + other}) == 1
    assert len({question for _, question in first + other}) > len(first)
