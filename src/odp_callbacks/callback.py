"""The Lightning callback: probes a running on-policy distillation and logs what each teacher is worth."""

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from peft import PeftModel
from torch import nn
from typing_extensions import override

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Row, rows_from_batch
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.teachers import as_teachers
from odp_callbacks.overhead import Overhead
from odp_callbacks.progress import ProbeProgress
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import save
from odp_callbacks.summaries import SPLITS, free_scalars, scalars
from odp_callbacks.tensorboard import write_tensorboard

StudentLocator = str | Callable[[LightningModule], nn.Module]


class GradientAlignmentCallback(Callback):
    r"""Measure, while a student trains, how far each teacher pulls where success lies.

    Every ``every_n_steps`` optimizer steps it takes some questions, samples the student's own rollouts, estimates at
    chosen tokens the ideal gradient by targeted continuations, and compares it with each teacher's distillation
    gradient on the LoRA parameters. It logs, step by step and through the trainer's own loggers,
    ``odp/alignment/<teacher>/<all|correct|incorrect>`` and likewise the other figures of
    :mod:`odp_callbacks.summaries`, each with ``_low`` and ``_high``, and ``odp/probe/…`` about the probe itself. A
    TensorBoard logger also gets histograms and coloured rollouts.

    It is a guest: weights, gradients, optimizer, random streams, module modes and adapters are bit for bit what they
    would be without it. A probe that fails is reported once and training goes on, unless ``strict``.

    The whole of the last probe is in :attr:`last_report`.

    Args:
        teachers: A mapping from name to teacher (:class:`~odp_callbacks.Teacher`, a model, ``"base"``, a context
            template), a list of teachers, or one.
        prompts: Questions: rows with a ``prompt`` and the columns that reward and contexts need, as a list or any
            dataset with ``len`` and indexing. None: the current batch's rows.
        reward: The verifier, a TRL reward function ``reward(prompts, completions, **columns) -> list[float]`` with
            values in [0, 1].
        every_n_steps: Optimizer steps between probes.
        questions_per_probe: How many questions a probe takes; the next ones in a shuffled order.
        max_overhead: The most that probes may take of the training's wall-clock time, in (0, 1). A probe that would
            exceed it gets fewer continuations, if the config gives it a ``budget`` or ``seconds``, or is left out; the
            first one always runs, for only then it is known what it takes. None: every probe runs in full.
        student: Where the student is: a dotted path in the LightningModule, a function of it, or None to find the
            only peft model in it.
        tokenizer: The student's; None takes the LightningModule's ``tokenizer`` or ``processing_class``.
        free_every_n_steps: Optimizer steps between looks at the training's own rollouts (free mode: predicted gain at
            the price of the gradients, no continuations). They are taken from the LightningModule's
            ``last_rollouts``, a list of ``(row, response token ids)`` that it sets in each training step, as
            :class:`~odp_callbacks.OnPolicyDistillation` does. None: no such looks.
        records: Folder to keep each probe's records in, as ``step-<step>``; see :mod:`odp_callbacks.storage`.
        at_start: Also probe before the first step.
        on_validation: Also probe at the end of every validation, and in ``trainer.validate``.
        confidence: Level of the intervals.
        seed: Of the callback's own random stream.
        strict: Let a failing probe fail the run.
        config: How a probe measures.
        **options: Fields of :class:`~odp_callbacks.ProbeConfig`, in place of ``config`` or on top of it.

    Raises:
        ValueError: Before training, if an argument is of no use: it says which, what was given and what would work.

    Example:
        >>> from odp_callbacks import GradientAlignmentCallback, Teacher
        >>> def reward(prompts, completions, answer):
        ...     return [float(c.strip() == a) for c, a in zip(completions, answer)]
        >>> callback = GradientAlignmentCallback(
        ...     teachers={"answer": Teacher("The answer is {answer}. {prompt}")},
        ...     prompts=[{"prompt": "1 + 1 =", "answer": "2"}],
        ...     reward=reward,
        ...     every_n_steps=50,
        ...     max_new_tokens=32,
        ... )
        >>> callback.config.max_new_tokens
        32
    """

    def __init__(
        self,
        teachers: object,
        prompts: Sequence[Row] | None,
        reward: RewardFunction,
        *,
        every_n_steps: int = 100,
        questions_per_probe: int = 8,
        max_overhead: float | None = 0.1,
        student: StudentLocator | None = None,
        tokenizer: Any = None,
        free_every_n_steps: int | None = None,
        records: str | PathLike[str] | None = None,
        at_start: bool = False,
        on_validation: bool = False,
        confidence: float = 0.95,
        seed: int = 0,
        strict: bool = False,
        config: ProbeConfig | None = None,
        **options: Any,
    ) -> None:
        numbers = {
            "every_n_steps": every_n_steps,
            "questions_per_probe": questions_per_probe,
            "free_every_n_steps": 1 if free_every_n_steps is None else free_every_n_steps,
        }
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"`{name}` must be a positive integer, but {number!r} was given.")
        if max_overhead is not None and not 0 < max_overhead < 1:
            raise ValueError(f"`max_overhead` must lie in (0, 1) or be None, but {max_overhead!r} was given.")
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` must lie in (0, 1), but {confidence!r} was given.")
        if not callable(reward):
            raise TypeError(f"`reward` must be a function of prompts, completions and columns, but got {reward!r}.")
        if prompts is not None and not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
            raise TypeError(f"`prompts` must be rows with `len` and indexing, or None, but got {prompts!r}.")
        known = {field.name for field in fields(ProbeConfig)}
        if unknown := sorted(set(options) - known):
            raise TypeError(f"unknown argument {unknown[0]!r}; a probe's options are {sorted(known)}.")
        self.teachers = as_teachers(teachers)
        self.prompts = prompts
        self.reward = reward
        self.every_n_steps = every_n_steps
        self.questions_per_probe = questions_per_probe
        self.student = student
        self.tokenizer = tokenizer
        self.free_every_n_steps = free_every_n_steps
        self.records = None if records is None else Path(records)
        self.at_start = at_start
        self.on_validation = on_validation
        self.confidence = confidence
        self.seed = seed
        self.strict = strict
        self.config = replace(config or ProbeConfig(), **options)
        self.last_report: ProbeReport | None = None
        self._probe: Probe | None = None
        self._free: Probe | None = None
        self._stream = torch.Generator().manual_seed(seed)
        self._order: list[int] = []
        self._probes = 0
        # -1: no step was seen yet, so that a probe at step 0 is not taken for one that has run.
        self._last_step = -1
        self._last_probe = -1
        self._overhead = Overhead(max_overhead)
        self._said: set[str] = set()

    def should_probe(self, step: int, last_step: int) -> bool:
        """Whether to probe after optimizer step ``step``, the previous one seen being ``last_step``; to override.

        Several optimizers can take more than one step in a batch: a multiple that was jumped over counts.
        """
        return step // self.every_n_steps > max(last_step, 0) // self.every_n_steps

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(teachers=tuple(self.teachers), every=self.every_n_steps, seed=self.seed)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A student that `configure_model` builds is not there yet; `on_fit_start` comes after it.
        if self._find(pl_module) or not is_overridden("configure_model", pl_module):
            self._prepare(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._probe is None:
            self._prepare(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._overhead.start()
        self._update_teachers(trainer.global_step)
        # A step before the last one seen: this callback watches a new run.
        if self._last_step < 0 or trainer.global_step < self._last_step:
            self._last_step = trainer.global_step
            if self.at_start and self.prompts is not None:
                self._run(trainer, None)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:  # still accumulating gradients
            return
        self._update_teachers(step)
        due = self.should_probe(step, self._last_step)
        every = self.free_every_n_steps
        free = every is not None and step // every > max(self._last_step, 0) // every
        self._last_step = step
        if due:
            self._run(trainer, batch)
        if free:
            self._look(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.on_validation or trainer.sanity_checking or self._last_probe == trainer.global_step:
            return
        if self.prompts is None:
            self._say("`on_validation` needs `prompts`: no training batch is at hand, and no probe was made.")
            return
        self._run(trainer, None)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._overhead.stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "probes": self._probes,
            "last_step": self._last_step,
            "last_probe": self._last_probe,
            "order": list(self._order),
            "stream": self._stream.get_state(),
            "overhead": self._overhead.state_dict(),
            "teachers": {name: teacher.state_dict() for name, teacher in self.teachers.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._probes = state_dict["probes"]
        self._last_step = state_dict["last_step"]
        self._last_probe = state_dict["last_probe"]
        self._order = list(state_dict["order"])
        self._stream.set_state(state_dict["stream"])
        self._overhead.load_state_dict(state_dict["overhead"])
        for name, state in state_dict["teachers"].items():
            self.teachers[name].load_state_dict(state)

    def _prepare(self, pl_module: LightningModule) -> None:
        """Find the student and its tokenizer, and check everything that can be checked before training."""
        students = self._find(pl_module)
        if len(students) != 1:
            raise ValueError(
                f"`student` must be one peft model, but {len(students)} were found in {type(pl_module).__name__}; "
                "wrap the student with peft.get_peft_model, or give its dotted path or a function as `student`."
            )
        tokenizer = self.tokenizer
        for name in ("tokenizer", "processing_class"):
            tokenizer = getattr(pl_module, name, None) if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                f"`tokenizer` was not given, and {type(pl_module).__name__} has neither `tokenizer` nor "
                "`processing_class`; give the student's tokenizer."
            )
        if self._probe is not None and self._probe.student is students[0]:
            return
        self._probe = Probe(students[0], tokenizer, self.reward, self.teachers, self.config)
        if self.free_every_n_steps is not None:
            if not hasattr(pl_module, "last_rollouts"):
                raise ValueError(
                    f"`free_every_n_steps` was given, but {type(pl_module).__name__} has no `last_rollouts`; set it "
                    "in each training step to a list of (row, response token ids), or give None."
                )
            free = replace(self.config, budget=0, seconds=None, half_width=None, step_alignment=False)
            self._free = Probe(students[0], tokenizer, self.reward, self.teachers, free)
        if self.prompts is not None:
            # Evenly spread over a large dataset; whatever is drawn later is checked again then.
            step = max(1, len(self.prompts) // 1000)
            self._probe.validate([self.prompts[i] for i in range(0, len(self.prompts), step)])

    def _find(self, pl_module: LightningModule) -> list[nn.Module]:
        if callable(self.student):
            return [self.student(pl_module)]
        if isinstance(self.student, str):
            try:
                return [pl_module.get_submodule(self.student)]
            except AttributeError:
                raise ValueError(
                    f"`student` is {self.student!r}, but {type(pl_module).__name__} has no such submodule; "
                    f"it has {sorted(name for name, _ in pl_module.named_children())}."
                ) from None
        return [module for module in pl_module.modules() if isinstance(module, PeftModel)]

    def _run(self, trainer: Trainer, batch: Any) -> None:
        """One probe: take questions, measure, log. Whatever goes wrong in it stays in it, unless ``strict``."""
        go, seconds = self._plan(trainer, "probe")
        if not go:
            return
        start = time.perf_counter()
        self._probes += 1
        self._last_probe = trainer.global_step
        try:
            report = self._measure(trainer, batch, seconds)
            metrics = scalars(report, self.confidence)
        except Exception as error:
            if self.strict:
                raise
            self._say(f"a probe failed, and training goes on without it: {type(error).__name__}: {error}")
            report = None
            metrics = {f"odp/alignment/{name}/{split}": float("nan") for name in self.teachers for split in SPLITS}
        self._overhead.tick()
        spent = {} if report is None else report.seconds
        self._overhead.book("probe", time.perf_counter() - start, spent.get("continuations", 0.0), seconds is not None)
        metrics["odp/probe/time_share"] = self._overhead.time_share
        metrics["odp/probe/left_out"] = float(self._overhead.skipped)
        self._log(trainer, metrics, report)
        if report is not None and self.records is not None and trainer.is_global_zero:
            try:
                save(report, self.records / f"step-{trainer.global_step:08d}", overwrite=True)
            except Exception as error:
                if self.strict:
                    raise
                self._say(f"records of a probe were not kept: {type(error).__name__}: {error}")
        self.last_report = report

    def _plan(self, trainer: Trainer, kind: str) -> tuple[bool, float | None]:
        """Whether ``max_overhead`` leaves time for a probe; all processes do what the first one finds."""
        self._overhead.tick()
        before = self._overhead.skipped
        plan = self._overhead.plan(kind, flexible=self.config.adaptive and kind == "probe")
        go, seconds = trainer.strategy.broadcast(plan)
        if not go and before == 0:
            took = self._overhead.costs[kind][0]
            rank_zero_info(
                f"odp-callbacks: the {kind} at step {trainer.global_step} is left out: the last one took {took:.1f} s, "
                f"and together they would exceed `max_overhead` = {self._overhead.share} of the training time "
                f"({self._overhead.time_share:.2f} so far). Others may follow; `odp/probe/left_out` counts them."
            )
        return go, seconds

    def _measure(self, trainer: Trainer, batch: Any, seconds: float | None) -> ProbeReport:
        assert self._probe is not None
        ids, rows = self._next_rows(batch)
        seed = int(torch.randint(2**62, (), generator=self._stream))
        with trainer.precision_plugin.forward_context(), ProbeProgress(trainer) as progress:
            report = self._probe.run(rows, seed=seed, ids=ids, seconds=seconds, progress=progress)
        scored = {r.reward for r in report.rollouts} | {
            float(t / c) for n in report.nodes for t, c in zip(n.total, n.count)
        }
        if len(scored) == 1:
            self._say(
                f"`reward` gave {scored.pop()} to every rollout and continuation of a probe, so no alignment is "
                "defined (NaN); questions that the student sometimes solves, or more of them, would help."
            )
        return report

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The free mode on the training's own rollouts."""
        assert self._free is not None
        if not self._plan(trainer, "free look")[0]:
            return
        start = time.perf_counter()
        try:
            module: Any = pl_module
            # One row and its responses are one question: they are each other's baseline.
            rows: dict[int, Row] = {}
            responses: dict[int, list[Sequence[int]]] = {}
            for row, ids in module.last_rollouts:
                rows[id(row)] = row
                responses.setdefault(id(row), []).append(ids)
            if not rows:
                return
            seed = int(torch.randint(2**62, (), generator=self._stream))
            with trainer.precision_plugin.forward_context():
                report = self._free.run(list(rows.values()), seed=seed, responses=list(responses.values()))
            logged = free_scalars(report, self.confidence)
        except Exception as error:
            if self.strict:
                raise
            self._say(f"the free mode failed, and training goes on without it: {type(error).__name__}: {error}")
            logged = {f"odp/free/predicted_gain/{name}": float("nan") for name in self.teachers}
        self._overhead.tick()
        logged["odp/free/seconds"] = time.perf_counter() - start
        self._overhead.book("free look", logged["odp/free/seconds"])
        self._log(trainer, logged, None)

    def _next_rows(self, batch: Any) -> tuple[list[str], list[Row]]:
        """The next questions with stable ids, in an order that is shuffled anew at each pass; or the batch's."""
        if self.prompts is None:
            rows = rows_from_batch(batch)[: self.questions_per_probe]
            return [f"{self._last_probe}.{i}" for i in range(len(rows))], rows
        wanted = min(self.questions_per_probe, len(self.prompts))
        if len(self._order) < wanted:
            rest = set(self._order)
            shuffled = torch.randperm(len(self.prompts), generator=self._stream).tolist()
            self._order += [i for i in shuffled if i not in rest]
        chosen, self._order = self._order[:wanted], self._order[wanted:]
        return [str(i) for i in chosen], [self.prompts[i] for i in chosen]

    def _log(self, trainer: Trainer, metrics: dict[str, float], report: ProbeReport | None) -> None:
        """To every logger at the optimizer's step, and where other callbacks look."""
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            experiment = getattr(logger, "experiment", None) if report is not None and trainer.is_global_zero else None
            if report is not None and hasattr(experiment, "add_histogram"):
                try:
                    write_tensorboard(experiment, report, step)
                except Exception as error:
                    self._say(f"no pictures of a probe: {type(error).__name__}: {error}")
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def _update_teachers(self, step: int) -> None:
        assert self._probe is not None
        for teacher in self.teachers.values():
            teacher.update(self._probe.student, step)

    def _say(self, message: str) -> None:
        """Warn once."""
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"odp-callbacks: {message}")
