"""``odp-callbacks diagnose``: measure which teacher would help a student, without training it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from torch import nn

from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.cli.arguments import add_json_argument, command_parser
from odp_callbacks.cli.datasets import load_questions
from odp_callbacks.cli.diagnosis import run_diagnosis
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.results import result_console, show_ranking, terminal_text
from odp_callbacks.cli.rewards import load_reward
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.teachers import ModelTeacher, as_teachers
from odp_callbacks.files import check_can_be_written, local_path
from odp_callbacks.records import ProbeReport

MODEL_PREFIX = "model:"


@dataclass(frozen=True)
class DiagnoseOptions:
    """The arguments of ``odp-callbacks diagnose``.

    Attributes:
        dataset: A .jsonl, .parquet or .csv file with a column ``prompt``, ``reasoning-gym:<task>``, or the name of a
            dataset on the hub.
        teachers: By name, ``base``, ``model:<folder or hub name>``, or a context in which the student is the teacher: a
            template of the dataset's columns such as ``"The answer is {answer}. {prompt}"``.
        student: Folder or hub name of the student; none for SmolLM2-135M-Instruct.
        adapter: Folder of a LoRA adapter; none for a fresh one, on which gradients are taken.
        lora_rank: Rank of a fresh adapter.
        reward: ``task`` (the reward of a reasoning-gym task), ``exact`` (the response equals the column ``answer``),
            ``math-verify``, or the import path of a TRL reward function.
        split: Split of a dataset on the hub.
        questions: How many questions to measure; the first of the dataset are taken.
        shots: Solved examples in the prompts of a reasoning-gym task.
        settings: Settings of a reasoning-gym task, such as ``{max_digits: 1}``.
        stop: Texts whose last token also ends a response, such as a line's end.
        measure: How to measure.
        seed: Seed of all random draws.
        confidence: Level of the intervals.
        output: Folder for records and report. The same command, started again, resumes what is there.
    """

    dataset: str
    teachers: dict[str, str]
    student: str | None = None
    adapter: str | None = None
    lora_rank: int = 8
    reward: str = "task"
    split: str = "train"
    questions: int = 16
    shots: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    measure: ProbeConfig = field(default_factory=lambda: ProbeConfig(step_alignment=False))
    seed: int = 0
    confidence: float = 0.95
    output: str = "diagnosis"

    def check(self) -> None:
        """Raise a ValueError for what is wrong whatever the dataset and the models hold."""
        if self.questions < 1:
            raise ValueError(f"`questions` must be a positive integer, but {self.questions} was given.")
        check_confidence(self.confidence)
        check_can_be_written("output", local_path("output", self.output))

    def identity(self) -> dict[str, Any]:
        """What distinguishes this diagnosis from another one, besides questions, seed and ``measure``."""
        names = ("student", "adapter", "lora_rank", "reward", "teachers")
        return {name: getattr(self, name) for name in names}


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of ``odp-callbacks diagnose``, and run it."""
    parser = command_parser(
        "diagnose", "Which teacher, or which context, would help this student? Measured without any training."
    )
    add_json_argument(parser)
    parser.add_class_arguments(DiagnoseOptions)
    given = parser.parse_args(list(arguments)).as_dict()
    as_json = given.pop("json")
    del given["config"]
    options = DiagnoseOptions(**{**given, "measure": ProbeConfig(**given["measure"])})
    console = result_console(as_json)
    report = diagnose(options, console)
    show_ranking(
        [("", report)], local_path("output", options.output) / "report.html", options.confidence, console, as_json
    )
    return 0


def diagnose(options: DiagnoseOptions, console: Console) -> ProbeReport:
    """Load what the options name, and measure; all that can be refused without a model is refused first.

    Args:
        options: The arguments of the command.
        console: Where progress is shown.

    Raises:
        ValueError: If an option does not work.
    """
    options.check()
    rows, task_reward = load_questions(
        options.dataset,
        count=options.questions,
        split=options.split,
        shots=options.shots,
        seed=options.seed,
        settings=options.settings,
    )
    reward = load_reward(options.reward, task_reward, rows)
    check_contexts(options.teachers, rows)
    model, tokenizer = _load_named_model(
        "student", options.student, lambda message: console.print(terminal_text(message))
    )
    student = _with_adapter(model, options)
    teachers = _load_teachers(options.teachers)
    config = replace(
        options.measure,
        eos_token_ids=(*options.measure.eos_token_ids, *stop_token_ids(options.stop, tokenizer)),
    )
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("rollouts", total=len(rows))
        return run_diagnosis(
            student,
            tokenizer,
            rows,
            reward,
            teachers,
            local_path("output", options.output),
            config=config,
            seed=options.seed,
            identity=options.identity(),
            on_stage=lambda stage, done, total: progress.update(bar, description=stage, completed=done, total=total),
        )


def check_contexts(teachers: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Check that the rows have the columns that the teachers' contexts name.

    Raises:
        ValueError: If a teacher is neither ``base`` nor a model nor a template, or if its template does not fit a row.
    """
    # External models are loaded later; here they count as the student's own base.
    contexts = as_teachers({name: "base" if kind.startswith(MODEL_PREFIX) else kind for name, kind in teachers.items()})
    for name, teacher in contexts.items():
        for row in rows:
            try:
                teacher.prompt(row)
            except (ValueError, LookupError, AttributeError) as error:
                raise ValueError(f"`teachers` has {name!r}, whose context does not fit: {error}") from error


def stop_token_ids(texts: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The last token of each text, sorted.

    Raises:
        ValueError: If a text has no token.
    """
    token_ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
    if texts_without_token := [text for text, ids in token_ids.items() if not ids]:
        raise ValueError(
            f"`stop` has {texts_without_token[0]!r}, which has no token; give texts such as '\\n', or none."
        )
    return tuple(sorted({ids[-1] for ids in token_ids.values()}))


def _with_adapter(model: nn.Module, options: DiagnoseOptions) -> nn.Module:
    """The model with the adapter that the options name, or with a fresh one."""
    torch.manual_seed(options.seed)
    adapted: Any
    if options.adapter is None:
        lora = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
    else:
        adapted = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    student: nn.Module = adapted.eval()
    return student


def _load_teachers(teachers: Mapping[str, str]) -> dict[str, Any]:
    """The teachers by name, with the external models loaded."""
    loaded: dict[str, Any] = dict(teachers)
    for name, kind in teachers.items():
        if kind.startswith(MODEL_PREFIX):
            model, tokenizer = _load_named_model("teachers", kind.removeprefix(MODEL_PREFIX), lambda message: None)
            loaded[name] = ModelTeacher(model, tokenizer=tokenizer)
    return loaded


def _load_named_model(argument: str, name: str | None, inform: Callable[[str], None]) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer; an error names the argument."""
    try:
        return load_student(name, inform)
    except (OSError, ValueError) as error:
        if name is None:
            raise
        raise ValueError(
            f"`{argument}` names {name!r}, which is neither a folder with a model nor available on the hub "
            f"({str(error).splitlines()[0]})."
        ) from error
