"""``odp-callbacks diagnose``: measure which teacher would help a student, without training it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from torch import nn

from odp_callbacks.analysis.jackknife import check_confidence
from odp_callbacks.analysis.paper.records import PaperRecord
from odp_callbacks.analysis.time_shortage import time_shortage
from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.cli.arguments import add_json_argument, command_parser
from odp_callbacks.cli.datasets import QuestionOptions
from odp_callbacks.cli.demonstration_files import add_demonstrations, load_rows
from odp_callbacks.cli.launched_processes import ALONE, console_of, launched_processes, prepared_together
from odp_callbacks.cli.model_placement import ModelPlacement
from odp_callbacks.cli.models import load_named_model, stop_token_ids
from odp_callbacks.cli.paper_diagnosis import RECORD_FILE, run_paper_diagnosis, show_paper_record
from odp_callbacks.cli.results import result_console, show_ranking, terminal_text
from odp_callbacks.cli.shared_diagnosis import check_shares, run_shared_diagnosis
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.diagnosis import check_protocol
from odp_callbacks.engine.paper import PaperConfig
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.teachers import ModelTeacher, as_teachers
from odp_callbacks.files import check_can_be_written, local_path
from odp_callbacks.records import ProbeReport

MODEL_PREFIX = "model:"


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions(QuestionOptions, ModelPlacement):
    """The arguments of ``odp-callbacks diagnose``, beside those about the questions.

    Attributes:
        teachers: By name, ``base``, ``model:<folder or hub name>``, or a context in which the student is the teacher: a
            template of the dataset's columns such as ``"The answer is {answer}. {prompt}"``, or a context of
            demonstrations such as ``self-1c``.
        student: Folder or hub name of the student; none for SmolLM2-135M-Instruct.
        adapter: Folder of a LoRA adapter; none for a fresh one, on which gradients are taken.
        lora_rank: Rank of a fresh adapter.
        stop: Texts whose last token also ends a response, such as a line's end.
        measure: How to measure.
        protocol: ``default`` for this project's measurement, or ``paper`` for that of arXiv:2605.10889, which writes
            ``paper.npz``.
        paper: How to measure by the paper's protocol, in place of ``measure``.
        demonstrations: Files that ``odp-callbacks demonstrations`` wrote for the same questions, whose columns the
            teachers' contexts can show. Questions that a file lacks are left out.
        teacher_accuracy: How many responses to each question every teacher gives under its own context, to be scored
            like the student's; 0 for none.
        confidence: Level of the intervals.
        output: Folder for records and report. The same command, started again, resumes what is there.
    """

    teachers: dict[str, str]
    student: str | None = None
    adapter: str | None = None
    lora_rank: int = 8
    stop: list[str] = field(default_factory=list)
    measure: ProbeConfig = field(default_factory=lambda: ProbeConfig(step_alignment=False))
    protocol: str = "default"
    paper: PaperConfig = field(default_factory=PaperConfig)
    demonstrations: list[str] = field(default_factory=list)
    teacher_accuracy: int = 0
    confidence: float = 0.95
    output: str = "diagnosis"

    def check(self) -> None:
        """Raise a ValueError for what is wrong whatever the dataset and the models hold."""
        if self.teacher_accuracy < 0:
            raise ValueError(f"`teacher_accuracy` must be 0 or positive, but {self.teacher_accuracy} was given.")
        check_protocol(self.protocol)
        self.check_placement()
        check_confidence(self.confidence)
        check_can_be_written("output", local_path("output", self.output))

    def identity(self) -> dict[str, Any]:
        """What distinguishes this diagnosis from another one, besides questions, seed and ``measure``."""
        names = ("student", "adapter", "lora_rank", "reward", "teachers", "dtype", "load_in_4bit")
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
    configurations = {"measure": ProbeConfig(**given["measure"]), "paper": PaperConfig(**given["paper"])}
    options = DiagnoseOptions(**{**given, **configurations})
    output = local_path("output", options.output)
    with launched_processes() as processes:
        console = console_of(processes, result_console(as_json))
        report = diagnose(options, console, processes)
    if processes.rank > 0:
        return 0
    if isinstance(report, PaperRecord):
        show_paper_record(report, output / RECORD_FILE, options.confidence, console, as_json)
    else:
        show_ranking([("", report)], output / "report.html", options.confidence, console, as_json)
        if sentence := time_shortage(report):
            console.print(terminal_text(sentence))
    return 0


def diagnose(options: DiagnoseOptions, console: Console, processes: Processes = ALONE) -> ProbeReport | PaperRecord:
    """Load what the options name, and measure; all that can be refused without a model is refused first.

    Args:
        options: The arguments of the command.
        console: Where progress is shown.
        processes: The processes that share the questions.

    Returns:
        The measurement of all questions, in every process.

    Raises:
        ValueError: If an option does not work.
    """
    prepared = prepared_together(processes, lambda: _prepare(options, console, processes))
    stop = prepared.pop("eos_token_ids")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("rollouts", total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(bar, description=stage, completed=done, total=total)

        measured: dict[str, Any] = {
            **prepared,
            "output": local_path("output", options.output),
            "seed": options.seed,
            "identity": options.identity(),
            "on_stage": show,
            "processes": processes,
        }
        if options.protocol == "paper":
            paper = replace(options.paper, eos_token_ids=(*options.paper.eos_token_ids, *stop))
            return run_paper_diagnosis(**measured, config=paper)
        config = replace(options.measure, eos_token_ids=(*options.measure.eos_token_ids, *stop))
        return run_shared_diagnosis(**measured, config=config, teacher_accuracy=options.teacher_accuracy)


def _prepare(options: DiagnoseOptions, console: Console, processes: Processes) -> dict[str, Any]:
    """Load questions and models; they are arguments of the functions that measure."""
    options.check()
    rows, reward = options.load()
    if options.demonstrations:
        count = len(rows)
        rows = add_demonstrations(rows, [load_rows(file) for file in options.demonstrations])
        console.print(f"{len(rows)} of {count} questions have demonstrations; the others are left out.")
    check_contexts(options.teachers, rows)
    check_shares(processes, rows)
    model, tokenizer = load_named_model(
        "student", options.student, lambda message: console.print(terminal_text(message)), options
    )
    return {
        "student": _with_adapter(model, options),
        "tokenizer": tokenizer,
        "rows": rows,
        "reward": reward,
        "teachers": _load_teachers(options),
        "eos_token_ids": stop_token_ids(options.stop, tokenizer),
    }


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


def _load_teachers(options: DiagnoseOptions) -> dict[str, Any]:
    """The teachers by name, with the external models loaded."""
    loaded: dict[str, Any] = dict(options.teachers)
    for name, kind in options.teachers.items():
        if kind.startswith(MODEL_PREFIX):
            model, tokenizer = load_named_model("teachers", kind.removeprefix(MODEL_PREFIX), lambda _: None, options)
            loaded[name] = ModelTeacher(model, tokenizer=tokenizer)
    return loaded
