"""``odp-callbacks demonstrations``: sample and verify the demonstrations that contexts of teachers show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from torch import nn

from odp_callbacks.cli.arguments import add_json_argument, command_parser
from odp_callbacks.cli.datasets import QuestionOptions
from odp_callbacks.cli.demonstration_files import FORMATS, write_rows
from odp_callbacks.cli.model_placement import ModelPlacement
from odp_callbacks.cli.models import load_named_model, stop_token_ids
from odp_callbacks.cli.results import print_json, result_console, terminal_text
from odp_callbacks.engine.demonstration_store import DemonstrationStore
from odp_callbacks.engine.demonstration_summaries import summarise_demonstrations
from odp_callbacks.engine.demonstrations import (
    DemonstrationOptions,
    Demonstrations,
    demonstration_columns,
    sample_demonstrations,
)
from odp_callbacks.engine.engines.choice import LOCAL
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.teachers.demonstration_contexts import DEMONSTRATIONS, SUMMARY, source_column
from odp_callbacks.files import check_can_be_written, local_path

SAME_MODEL = "self"
"""Names the model of the demonstrations as that of the summaries."""
STORE_SUFFIX = ".store"


@dataclass(frozen=True, kw_only=True)
class DemonstrationsCommand(QuestionOptions, ModelPlacement):
    """The arguments of ``odp-callbacks demonstrations``, beside those about the questions.

    Attributes:
        model: Folder or hub name of the model that responds; none for SmolLM2-135M-Instruct.
        adapter: Folder of a LoRA adapter of that model.
        sample: How responses are sampled.
        summaries: Who summarises the first correct response: ``self``, or the folder or hub name of a model; none for
            no summaries.
        summary_max_new_tokens: Maximum length of a summary in tokens.
        stop: Texts whose last token also ends a response, such as a line's end.
        source: Put in front of the names of the new columns, for demonstrations of several models: with ``32B``, the
            context ``self-1c (32B)`` shows them.
        keep_all: Also write questions for which not all demonstrations were found.
        output: The .jsonl or .parquet file. What is finished is kept beside it in a file ``.store``, from which the
            same command, started again, resumes.
    """

    model: str | None = None
    adapter: str | None = None
    sample: DemonstrationOptions = field(default_factory=DemonstrationOptions)
    summaries: str | None = None
    summary_max_new_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    source: str = ""
    keep_all: bool = False
    output: str = "demonstrations.jsonl"

    def output_path(self) -> Path:
        """The file to write.

        Raises:
            ValueError: If its name or its place does not work.
        """
        path = local_path("output", self.output)
        if path.suffix not in FORMATS:
            raise ValueError(f"`output` must end in one of {list(FORMATS)}, but {self.output!r} was given.")
        check_can_be_written("output", path.parent)
        return path


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of ``odp-callbacks demonstrations``, and run it."""
    parser = command_parser("demonstrations", "Sample correct and wrong responses to show to a teacher in its context.")
    add_json_argument(parser)
    parser.add_class_arguments(DemonstrationsCommand)
    given = parser.parse_args(list(arguments)).as_dict()
    as_json = given.pop("json")
    del given["config"]
    options = DemonstrationsCommand(**{**given, "sample": DemonstrationOptions(**given["sample"])})
    console = result_console(as_json)
    result = make_demonstrations(options, console)
    if as_json:
        print_json(result)
    else:
        console.print(terminal_text(sentence(result)))
    return 0


def make_demonstrations(options: DemonstrationsCommand, console: Console) -> dict[str, Any]:
    """Load what the options name, sample, and write the file.

    Args:
        options: The arguments of the command.
        console: Where progress is shown.

    Returns:
        ``output``; the numbers of ``questions``, of those that were ``written``, of ``tries`` and of ``successes``; and
        in ``lacking`` how many questions lack ``correct`` or ``wrong`` responses or a ``summary``.

    Raises:
        ValueError: If an option does not work, or no question has all its demonstrations.
    """
    path = options.output_path()
    options.check_placement()
    rows, reward = options.load()

    def inform(message: str) -> None:
        console.print(terminal_text(message))

    model, tokenizer = load_named_model("model", options.model, inform, options)
    if options.adapter is not None:
        model = PeftModel.from_pretrained(model, options.adapter).eval()
    name = options.model or "SmolLM2-135M-Instruct"
    identity = {"model": name, "adapter": options.adapter, "reward": options.reward, "preset": options.preset}
    store = DemonstrationStore(path.with_name(path.name + STORE_SUFFIX), identity)
    stop = stop_token_ids(options.stop, tokenizer)
    sampling = replace(options.sample, eos_token_ids=(*options.sample.eos_token_ids, *stop))
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("demonstrations", total=len(rows))

        def show(stage: str, done: int, total: int) -> None:
            progress.update(bar, description=stage, completed=done, total=total)

        demonstrations = sample_demonstrations(
            model, tokenizer, rows, reward, sampling, seed=options.seed, store=store, progress=show
        )
        made_rows: list[Row] = [
            {**row, **demonstration_columns(one, name, options.source)}
            for row, one in zip(rows, demonstrations, strict=True)
        ]
        if options.summaries is not None:
            made_rows = _with_summaries(made_rows, options, model, tokenizer, store, show, inform)
    lacking = _lacking(demonstrations, made_rows, options)
    is_lacking = [any(reasons) for reasons in zip(*lacking.values(), strict=True)]
    counts = {part: sum(of_part) for part, of_part in lacking.items()}
    written = [row for row, lacks in zip(made_rows, is_lacking, strict=True) if options.keep_all or not lacks]
    if not written:
        raise ValueError(nothing_found(len(rows), counts, options))
    write_rows(written, path)
    return {
        "output": str(path),
        "questions": len(rows),
        "written": len(written),
        "lacking": counts,
        "tries": sum(one.tries for one in demonstrations),
        "successes": sum(one.successes for one in demonstrations),
    }


def _lacking(
    found: Sequence[Demonstrations], rows: Sequence[Row], options: DemonstrationsCommand
) -> dict[str, list[bool]]:
    """For each part that was asked for, whether each question lacks it."""
    summary_column = source_column(SUMMARY, options.source)
    return {
        "correct": [len(one.correct) < options.sample.correct for one in found],
        "wrong": [len(one.wrong) < options.sample.wrong for one in found],
        "summary": [
            options.summaries is not None and bool(one.correct) and not row[summary_column]
            for one, row in zip(found, rows, strict=True)
        ],
    }


def _with_summaries(
    rows: Sequence[Row],
    options: DemonstrationsCommand,
    model: nn.Module,
    tokenizer: Any,
    store: DemonstrationStore,
    show: Callable[[str, int, int], None],
    inform: Callable[[str], None],
) -> list[Row]:
    """The rows with a summary of their first correct response."""
    assert options.summaries is not None
    sampling = replace(options.sample, max_new_tokens=options.summary_max_new_tokens)
    if options.summaries != SAME_MODEL:
        model, tokenizer = load_named_model("summaries", options.summaries, inform, options)
        store.identity = {"model": options.summaries}
        sampling = replace(sampling, engine=LOCAL)  # the engine has the other model
    asked = [{**row, DEMONSTRATIONS: row[source_column(DEMONSTRATIONS, options.source)]} for row in rows]
    summaries = summarise_demonstrations(
        model, tokenizer, asked, sampling, seed=options.seed, store=store, progress=show
    )
    summary_column = source_column(SUMMARY, options.source)
    return [{**row, summary_column: summary} for row, summary in zip(rows, summaries, strict=True)]


def sentence(result: dict[str, Any]) -> str:
    """What was done, in words.

    Examples:
        >>> counts = {"questions": 8, "written": 6, "tries": 100, "successes": 25}
        >>> sentence({"output": "d.jsonl", **counts, "lacking": {"correct": 2, "wrong": 0, "summary": 0}})
        '6 of 8 questions written to d.jsonl (2 lack correct); 25 of 100 responses looked at were correct.'
    """
    return (
        f"{result['written']} of {result['questions']} questions written to {result['output']}"
        f"{_reasons(result['lacking'])}; {result['successes']} of {result['tries']} responses looked at were correct."
    )


def nothing_found(questions: int, lacking: dict[str, int], options: DemonstrationsCommand) -> str:
    """Why no question has what was asked for, and what would work."""
    return (
        f"none of {questions} questions has all that was asked for{_reasons(lacking)}; a response counts only if it "
        f"ended within {options.sample.max_new_tokens} tokens. Raise `sample.tries` or `sample.max_new_tokens`, give "
        "other questions, or `keep_all`."
    )


def _reasons(lacking: dict[str, int]) -> str:
    """How many questions lack what; empty if none does."""
    reasons = [f"{count} lack {part}" for part, count in lacking.items() if count]
    return f" ({', '.join(reasons)})" if reasons else ""
