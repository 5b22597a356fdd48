"""The command line: thin functions whose arguments are the flags, and the keys of a YAML file."""

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    from jsonargparse import ArgumentParser
    from rich.box import SIMPLE_HEAVY
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table
except ImportError as missing:
    raise SystemExit(f"the command line needs more ({missing.name}): pip install 'odp-callbacks[cli]'") from None


@dataclass
class Measure:
    """How to measure; the fields of :class:`~odp_callbacks.ProbeConfig` that a command line can give.

    Attributes:
        rollouts_per_question: Student rollouts of each question.
        max_new_tokens: Limit of a response, in tokens.
        temperature: Of sampling, and of both models in the loss.
        continuations: Continuations of each branch, where no budget is given.
        budget: Tokens to spend on continuations, over all questions; 0 for none at all.
        nodes: Which tokens are measured: exponential, every, uniform, entropy.
        max_branches: Likely tokens that are tried at each.
        tail_draws: Tokens drawn from the rest.
        divergence: The distillation loss.
        success_threshold: Reward from which a rollout counts as correct.
        batch_size: The most sequences sampled at a time.
    """

    rollouts_per_question: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    continuations: int = 4
    budget: int | None = None
    nodes: str = "exponential"
    max_branches: int = 4
    tail_draws: int = 2
    divergence: str = "reverse_kl"
    success_threshold: float = 1.0
    batch_size: int = 256


def diagnose(
    dataset: str,
    teachers: dict[str, str],
    student: str | None = None,
    adapter: str | None = None,
    lora_rank: int = 8,
    reward: str = "task",
    split: str = "train",
    questions: int = 16,
    shots: int = 2,
    settings: dict[str, Any] = {},  # noqa: B006
    stop: list[str] = [],  # noqa: B006 (jsonargparse shows it as the default)
    measure: Measure = Measure(),  # noqa: B008
    seed: int = 0,
    confidence: float = 0.95,
    output: str = "diagnosis",
    as_json: bool = False,
) -> int:
    """Which teacher, or which context, would help this student? Measured without any training.

    Args:
        dataset: A .jsonl, .parquet or .csv file with a column ``prompt``, ``reasoning-gym:<task>``, or a dataset's name
            on the hub.
        teachers: By name: ``base``, ``model:<folder or hub name>``, or the student under a context, a template of the
            dataset's columns such as ``"The answer is {answer}. {prompt}"``.
        student: Folder or hub name; none for SmolLM2-135M-Instruct.
        adapter: Folder of a LoRA adapter; none starts a fresh one, on which gradients are taken.
        lora_rank: Of a fresh adapter.
        reward: ``task`` (the one that comes with a reasoning-gym task), ``exact`` (equal to the column ``answer``),
            ``math-verify``, or the import path of a TRL reward function.
        split: Of a dataset on the hub.
        questions: How many, the first of the dataset.
        shots: Solved examples in the prompts of a reasoning-gym task.
        settings: Of a reasoning-gym task, such as ``{max_digits: 1}``.
        stop: Texts whose last token also ends a response, such as a line's end.
        measure: How to measure.
        seed: Of everything random.
        confidence: Level of the intervals.
        output: Folder for records and report; started again with the same arguments, it goes on where it was.
        as_json: Print the ranking as JSON, and nothing else.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from odp_callbacks.analysis.jackknife import check_confidence
    from odp_callbacks.cli.datasets import load_questions, load_reward
    from odp_callbacks.cli.diagnosis import run_diagnosis
    from odp_callbacks.engine.config import ProbeConfig
    from odp_callbacks.engine.teachers import ModelTeacher, as_teachers

    console = Console(stderr=as_json)
    # All that can be refused is, before a model is loaded.
    if questions < 1:
        raise ValueError(f"`questions` must be a positive integer, but {questions} was given.")
    check_confidence(confidence)
    ProbeConfig(**asdict(measure))
    named = as_teachers({name: "base" if kind.startswith("model:") else kind for name, kind in teachers.items()})
    rows, own = load_questions(dataset, count=questions, split=split, shots=shots, seed=seed, settings=settings)
    verifier = load_reward(reward, own, rows)
    for name, teacher in named.items():
        for row in rows:
            try:
                teacher.prompt(row)
            except (ValueError, LookupError, AttributeError) as error:
                raise ValueError(f"`teachers` has {name!r}, whose context does not fit: {error}") from error
    model, tokenizer = _model("student", student, lambda message: console.print(escape(message)))
    torch.manual_seed(seed)
    pupil: Any = (
        get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, task_type="CAUSAL_LM"))
        if adapter is None
        else PeftModel.from_pretrained(model, adapter, is_trainable=True)
    )
    made: dict[str, Any] = {}
    for name, kind in teachers.items():
        made[name] = kind
        if kind.startswith("model:"):
            external, its_tokenizer = _model("teachers", kind.removeprefix("model:"), lambda message: None)
            made[name] = ModelTeacher(external, tokenizer=its_tokenizer)
    ends = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in stop}
    if empty := [text for text, ids in ends.items() if not ids]:
        raise ValueError(f"`stop` has {empty[0]!r}, which is no token; give texts such as '\\n', or none.")
    bar = iter(track(range(len(rows)), "questions", console=console, transient=True))
    folder = Path(output)

    def step(done: int, total: int) -> None:
        next(bar, None)

    report = run_diagnosis(
        pupil.eval(),
        tokenizer,
        rows,
        verifier,
        made,
        folder,
        config=ProbeConfig(
            **asdict(measure), eos_token_ids=tuple(sorted({ids[-1] for ids in ends.values()})), step_alignment=False
        ),
        seed=seed,
        about={"student": student, "adapter": adapter, "lora_rank": lora_rank, "reward": reward, "teachers": teachers},
        progress=step,
    )
    return _tell(console, [("", report)], folder / "report.html", confidence, as_json)


def report(records: list[str], output: str = "report.html", confidence: float = 0.95, as_json: bool = False) -> int:
    """Build the report of kept records anew.

    Args:
        records: Folders of records; several are the probes of one run, in this order. A folder that holds folders of
            records, as that of a demo does, stands for all of them.
        output: The HTML file.
        confidence: Level of the intervals.
        as_json: Print the ranking as JSON, and nothing else.
    """
    from odp_callbacks.analysis.jackknife import check_confidence

    check_confidence(confidence)
    return _tell(Console(stderr=as_json), _load(records), Path(output), confidence, as_json)


def compare(first: str, second: str, confidence: float = 0.95, as_json: bool = False) -> int:
    """Set two runs or two checkpoints side by side.

    Args:
        first: Folder of records.
        second: Folder of records.
        confidence: Level of the intervals.
        as_json: Print the differences as JSON, and nothing else.
    """
    from odp_callbacks.analysis.jackknife import check_confidence
    from odp_callbacks.analysis.summaries import SPLITS, summarise

    check_confidence(confidence)
    found = []
    for folder in (first, second):
        _, one = _load([folder])[-1]
        found.append({(s.teacher, s.split): s.figures["predicted_gain"] for s in summarise(one, confidence)})
    shared = [key for key in found[0] if key in found[1] and key[1] in SPLITS]
    if not shared:
        raise ValueError("`first` and `second` have no teacher in common; their records must name one alike.")
    rows = []
    for teacher, split in shared:
        a, b = found[0][teacher, split], found[1][teacher, split]
        value, half = b.value - a.value, math.hypot(a.half_width, b.half_width)
        rows.append({
            "teacher": teacher, "rollouts": split, "first": a.value, "second": b.value, "difference": value,
            "low": value - half, "high": value + half,
            "verdict": "second higher" if value > half else "first higher" if -value > half else "cannot tell",
        })  # fmt: skip
    if as_json:
        print(json.dumps(_plain(rows)))
        return 0
    table = Table(box=SIMPLE_HEAVY, title="Predicted gain, second less first", show_edge=False)
    for head in ("teacher", "rollouts", "first", "second", "difference", ""):
        table.add_column(head, justify="left" if head in ("teacher", "rollouts", "") else "right")
    for row in rows:
        between = f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        table.add_row(
            _text(row["teacher"]), str(row["rollouts"]), f"{row['first']:+.3f}", f"{row['second']:+.3f}", between,
            str(row["verdict"]),
        )  # fmt: skip
    table.caption = "Intervals as of independent runs: with the same questions in both they are wider than need be."
    Console().print(table)
    return 0


FUNCTIONS: tuple[Callable[..., int], ...] = (diagnose, report, compare)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``odp-callbacks``.

    Args:
        arguments: Of the command line; ``sys.argv`` by default.

    Returns:
        Exit code: 0 when all went well, 1 when the run failed, 2 for a bad argument, 130 when interrupted.
    """
    parser = ArgumentParser(prog="odp-callbacks", description="Is my teacher helping?")
    commands = parser.add_subcommands(dest="command")
    for function in FUNCTIONS:
        one = ArgumentParser(description=(function.__doc__ or "").partition("\n")[0])
        one.add_argument("--config", action="config", help="A YAML file with these arguments.")
        positional = {"report": ["records"], "compare": ["first", "second"]}.get(function.__name__, [])
        for name in positional:
            one.add_argument(name, **({"nargs": "+", "type": str} if name == "records" else {"type": str}))
        one.add_argument("--json", action="store_true", help="Print the result as JSON, and nothing else.")
        skipped: set[str | int] = {*positional, "as_json"}
        one.add_function_arguments(function, skip=skipped, as_positional=False)
        commands.add_subcommand(function.__name__, one)
    try:
        from odp_callbacks.demo.run import DemoConfig

        demo = ArgumentParser(description="Distil a real student on two cores and see which teacher helps.")
        demo.add_argument("--config", action="config", help="A YAML file with these arguments.")
        demo.add_class_arguments(DemoConfig)
        commands.add_subcommand("demo", demo)
    except ImportError:
        logging.getLogger(__name__).debug("the demo needs the extra `demo`")
    options = parser.parse_args(None if arguments is None else list(arguments))
    command = options.command
    given = parser.instantiate(options)[command].as_dict()
    given.pop("config", None)
    as_json = given.pop("json", False)
    try:
        if command == "demo":
            from odp_callbacks.demo.run import run_demo

            run_demo(DemoConfig(**given), Console())
            return 0
        (function,) = (f for f in FUNCTIONS if f.__name__ == command)
        return int(function(**given, as_json=as_json))
    except ValueError as error:
        print(f"odp-callbacks {command}: {_text(str(error))}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"odp-callbacks {command}: {_text(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        on = "; the same command goes on from here" if command == "diagnose" else ""
        print(f"\nodp-callbacks: interrupted{on}.", file=sys.stderr)
        return 130


def _load(folders: Sequence[str]) -> list[tuple[str, Any]]:
    from odp_callbacks.storage import load

    found: list[Path] = []
    for folder in map(Path, folders):
        here = [folder, folder / "records"]
        whole = [one for one in here if (one / "nodes.parquet").exists()][:1]
        for pattern in ("*/nodes.parquet", "records/*/nodes.parquet"):
            whole = whole or sorted(path.parent for path in folder.glob(pattern))
        if not whole:
            raise ValueError(f"`records` names {str(folder)!r}, where there are no records of odp-callbacks.")
        found += whole
    return [(name, load(one)) for name, one in zip(_names(found), found, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Names that tell folders apart: the last part of their paths in which they differ, and what follows."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [name.removesuffix("/records") for name in names]


def _model(argument: str, name: str | None, say: Callable[[str], None]) -> tuple[Any, Any]:
    """A model and its tokenizer; where there is none, the argument's name is in the error."""
    from odp_callbacks.cli.models import load_student

    try:
        return load_student(name, say)
    except (OSError, ValueError) as error:
        if name is None:
            raise
        raise ValueError(
            f"`{argument}` names {name!r}, which is neither a folder with a model nor to be had from the hub "
            f"({str(error).splitlines()[0]})."
        ) from error


def _tell(console: Console, several: list[tuple[str, Any]], page: Path, confidence: float, as_json: bool) -> int:
    from odp_callbacks.analysis.ranking import rank
    from odp_callbacks.visualization.html_report import write_report
    from odp_callbacks.visualization.table import summary_table

    last = several[-1][1]
    write_report(several if len(several) > 1 else last, page, confidence=confidence)
    ranking = rank(last, confidence)
    if as_json:
        print(json.dumps(_plain({"answer": ranking.answer, "report": str(page), "classes": {
            split: [asdict(place) for place in places] for split, places in ranking.classes.items()
        }})))  # fmt: skip
        return 0
    console.print(summary_table(last, confidence))
    console.print(f"\n[bold]{_text(ranking.answer)}[/bold]\nThe report: {_text(str(page))}")
    return 0


def _plain(value: Any) -> Any:
    """What JSON can hold: no NaN."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(text: object) -> str:
    """Text that a terminal shows and does not obey."""
    from odp_callbacks.text import printable

    return escape(printable(str(text)))


if __name__ == "__main__":
    sys.exit(main())
