"""What any trainer needs of a probe: when, of which questions, at what price, and where the outcome goes."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from odp_callbacks.analysis.summaries import SPLITS, free_scalars, scalars
from odp_callbacks.callbacks.processes import Processes
from odp_callbacks.callbacks.time_budget import TimeBudget
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.gradients.optimizer_geometry import adam_preconditioner
from odp_callbacks.engine.gradients.preconditioner import Preconditioner
from odp_callbacks.engine.probe import Probe
from odp_callbacks.engine.prompts import Row, rows_from_batch
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.engine.teachers import as_teachers
from odp_callbacks.records import ProbeReport
from odp_callbacks.storage import merge, save

Rollouts = Callable[[], Iterable[tuple[Row, Sequence[int]]]]


@dataclass(frozen=True)
class Host:
    """What a monitor asks of the trainer that it is a guest of, at one moment of the training.

    Args:
        step: Optimizer steps taken.
        first: Whether this is the process that writes files and pictures.
        processes: Those that train together; they share each probe's questions.
        context: The precision that the student is trained in.
        progress: Of what each stage took in the last probe, in seconds; gives, when entered, a function of a stage's
            name, what is done of it and how much there is.
        log: Takes figures, and the report of a probe if there is one to be drawn, to the trainer's loggers.
        warn: Says something that the user should change, in the first process only.
        note: Says something worth knowing, in the first process only.
        optimizers: Those that train the student.
    """

    step: int
    first: bool
    processes: Processes
    context: Callable[[], AbstractContextManager[Any]]
    progress: Callable[[Mapping[str, float]], AbstractContextManager[Callable[[str, int, int], None]]]
    log: Callable[[dict[str, float], ProbeReport | None], None]
    warn: Callable[[str], None]
    note: Callable[[str], None]
    optimizers: Sequence[Optimizer] = ()


class Monitor:
    """Probes a training run: a trainer's callback tells it where the run is, and it measures, logs and keeps.

    The arguments are those of :class:`~odp_callbacks.GradientAlignmentCallback`, but for what finds the student.
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
        free_every_n_steps: int | None = None,
        records: str | PathLike[str] | None = None,
        at_start: bool = False,
        on_validation: bool = False,
        confidence: float = 0.95,
        seed: int = 0,
        strict: bool = False,
        gate: object | None = None,
        optimizer_geometry: bool = False,
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
        self.free_every_n_steps = free_every_n_steps
        self.records = None if records is None else Path(records)
        self.at_start = at_start
        self.on_validation = on_validation
        self.confidence = confidence
        self.seed = seed
        self.strict = strict
        self.config = replace(config or ProbeConfig(), **options)
        self.last_report: ProbeReport | None = None
        self.probe: Probe | None = None
        self._free: Probe | None = None
        self.stream = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.probes = 0
        # -1: no step was seen yet, so that a probe at step 0 is not taken for one that has run.
        self.last_step = -1
        self.last_probe = -1
        self.gate = self._given_gate = gate
        self.optimizer_geometry = optimizer_geometry
        self._gate_state: dict[str, Any] | None = None
        self.time_budget = TimeBudget(max_overhead)
        self._said: set[str] = set()

    def should_probe(self, step: int, last_step: int) -> bool:
        """Whether a multiple of ``every_n_steps`` lies after ``last_step`` and not after ``step``."""
        return step // self.every_n_steps > max(last_step, 0) // self.every_n_steps

    def prepare(self, student: nn.Module, tokenizer: Any, gate: object = None, taught: Sequence[str] = ()) -> None:
        """Check everything that can be checked before training.

        Args:
            student: A peft model.
            tokenizer: The student's.
            gate: What acts on the loss, and learns where nothing else was given to.
            taught: Names of the teachers that training distils from, where they are known.

        Raises:
            ValueError: If something that was given cannot work.
        """
        if self._given_gate is None:
            self.gate = gate
        if gate is not None and gate is self.gate and (unknown := sorted(set(taught) - set(self.teachers))):
            raise ValueError(
                f"`gate` learns from probes, which measure the teachers {sorted(self.teachers)}, but {unknown[0]!r} "
                "teaches; name them alike in training and in the callback."
            )
        self._restore_gate()
        if self.probe is not None and self.probe.student is student:
            return
        self.probe = Probe(student, tokenizer, self.reward, self.teachers, self.config)
        if self.free_every_n_steps is not None:
            free = replace(self.config, budget=0, seconds=None, half_width=None, step_alignment=False)
            self._free = Probe(student, tokenizer, self.reward, self.teachers, free)
        if self.prompts is not None:
            # Evenly spread over a large dataset; whatever is drawn later is checked again then.
            step = max(1, len(self.prompts) // 1000)
            self.probe.validate([self.prompts[i] for i in range(0, len(self.prompts), step)])

    def start(self, host: Host) -> None:
        """Training starts, or goes on."""
        self._metric(host)  # refuses optimizers whose geometry is not known
        self.time_budget.start()
        self._update_teachers(host.step)
        # A step before the last one seen: this monitor watches a new run.
        if self.last_step < 0 or host.step < self.last_step:
            self.last_step = host.step
            if self.at_start and self.prompts is not None:
                self.run(host, None)

    def advance(
        self,
        host: Host,
        batch: Any = None,
        rollouts: Rollouts | None = None,
        due: Callable[[int, int], bool] | None = None,
    ) -> None:
        """A batch is done, with or without an optimizer step.

        Args:
            host: The trainer.
            batch: Whose rows are the questions where no ``prompts`` were given.
            rollouts: Gives the training's own rollouts, for the free mode.
            due: In place of :meth:`should_probe`.
        """
        if host.step == self.last_step:  # still accumulating gradients
            return
        self._update_teachers(host.step)
        probe = (due or self.should_probe)(host.step, self.last_step)
        every = self.free_every_n_steps
        free = every is not None and host.step // every > max(self.last_step, 0) // every
        self.last_step = host.step
        if probe:
            self.run(host, batch)
        if free and rollouts is not None:
            self._look(host, rollouts)

    def validated(self, host: Host) -> None:
        """A validation is done."""
        if not self.on_validation or self.last_probe == host.step:
            return
        if self.prompts is None:
            self.say(host, "`on_validation` needs `prompts`: no training batch is at hand, and no probe was made.")
            return
        self.run(host, None)

    def stop(self) -> None:
        """Training ends."""
        self.time_budget.stop()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on where this one was."""
        state = {
            "probes": self.probes,
            "last_step": self.last_step,
            "last_probe": self.last_probe,
            "order": list(self.order),
            "stream": self.stream.get_state(),
            "time_budget": self.time_budget.state_dict(),
            "teachers": {name: teacher.state_dict() for name, teacher in self.teachers.items()},
        }
        if hasattr(self.gate, "state_dict"):
            state["gate"] = self.gate.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run that saved this was."""
        self.probes = state_dict["probes"]
        self.last_step = state_dict["last_step"]
        self.last_probe = state_dict["last_probe"]
        self.order = list(state_dict["order"])
        self.stream.set_state(state_dict["stream"])
        self.time_budget.load_state_dict(state_dict["time_budget"])
        for name, state in state_dict["teachers"].items():
            self.teachers[name].load_state_dict(state)
        self._gate_state = state_dict.get("gate")
        self._restore_gate()

    def run(self, host: Host, batch: Any) -> None:
        """One probe: take questions, measure, log. Whatever goes wrong in it stays in it, unless ``strict``."""
        go, seconds = self._plan(host, "probe")
        if not go:
            return
        start = time.perf_counter()
        self.probes += 1
        self.last_probe = host.step
        report: ProbeReport | None = None
        metrics = {f"odp/alignment/{name}/{split}": float("nan") for name in self.teachers for split in SPLITS}
        with self.trying(host, "a probe failed, and training goes on without it"):
            found = self._measure(host, batch, seconds)
            metrics = scalars(found, self.confidence)
            report = found
        if report is not None:
            metrics |= self._observe(host, report)
        self.time_budget.tick()
        spent = {} if report is None else report.seconds
        self.time_budget.book(
            "probe", time.perf_counter() - start, spent.get("continuations", 0.0), seconds is not None
        )
        metrics["odp/probe/time_share"] = self.time_budget.time_share
        metrics["odp/probe/left_out"] = float(self.time_budget.skipped)
        measured = time.perf_counter()
        with self.trying(host, "figures of a probe were not logged"):
            host.log(metrics, report)
        if report is not None and self.records is not None and host.first:
            with self.trying(host, "records of a probe were not kept"):
                save(report, self.records / f"step-{host.step:08d}", overwrite=True)
        self.time_budget.extend("probe", time.perf_counter() - measured)
        self.last_report = report

    def _plan(self, host: Host, kind: str) -> tuple[bool, float | None]:
        """Whether ``max_overhead`` leaves time for a probe; all processes do what the first one finds."""
        self.time_budget.tick()
        before = self.time_budget.skipped
        plan = self.time_budget.plan(kind, flexible=self.config.adaptive and kind == "probe")
        go, seconds = host.processes.broadcast(plan)
        if not go and before == 0:
            took = self.time_budget.costs[kind][0]
            host.note(
                f"odp-callbacks: the {kind} at step {host.step} is left out: the last one took {took:.1f} s, "
                f"and together they would exceed `max_overhead` = {self.time_budget.share} of the training time "
                f"({self.time_budget.time_share:.2f} so far). Others may follow; `odp/probe/left_out` counts them."
            )
        return go, seconds

    def _measure(self, host: Host, batch: Any, seconds: float | None) -> ProbeReport:
        assert self.probe is not None
        probe = self.probe
        seed = int(torch.randint(2**62, (), generator=self.stream))

        def measure() -> ProbeReport | None:
            ids, rows = self.next_rows(batch, host.processes)
            if not rows:
                return None
            last = {} if self.last_report is None else self.last_report.seconds
            with host.context(), host.progress(last) as progress:
                metric = self._metric(host)
                return probe.run(rows, seed=seed, ids=ids, seconds=seconds, progress=progress, metric=metric)

        report = self._together(host, measure)
        assert report is not None, "a probe has questions"
        scored = {r.reward for r in report.rollouts} | {
            float(t / c) for n in report.nodes for t, c in zip(n.total, n.count)
        }
        if len(scored) == 1:
            self.say(
                host,
                f"`reward` gave {scored.pop()} to every rollout and continuation of a probe, so no alignment is "
                "defined (NaN); questions that the student sometimes solves, or more of them, would help.",
            )
        return report

    def _metric(self, host: Host) -> Preconditioner | None:
        """The geometry of the optimizer's next step, if it is asked for and there is one."""
        assert self.probe is not None
        return adam_preconditioner(host.optimizers, self.probe.student) if self.optimizer_geometry else None

    def _look(self, host: Host, rollouts: Rollouts) -> None:
        """The free mode on the training's own rollouts."""
        assert self._free is not None
        if not self._plan(host, "free look")[0]:
            return
        start = time.perf_counter()
        logged = {f"odp/free/predicted_gain/{name}": float("nan") for name in self.teachers}
        with self.trying(host, "the free mode failed, and training goes on without it"):
            seed = int(torch.randint(2**62, (), generator=self.stream))
            free = self._free

            def measure() -> ProbeReport | None:
                # One row and its responses are one question: they are each other's baseline.
                rows: dict[int, Row] = {}
                responses: dict[int, list[Sequence[int]]] = {}
                for row, response in rollouts():
                    rows[id(row)] = row
                    responses.setdefault(id(row), []).append(response)
                if not rows:
                    return None
                ids = [f"{host.processes.rank}.{i}" for i in range(len(rows))]
                with host.context():
                    return free.run(list(rows.values()), seed=seed, ids=ids, responses=list(responses.values()))

            report = self._together(host, measure)
            if report is None:
                return
            logged = free_scalars(report, self.confidence)
        self.time_budget.tick()
        logged["odp/free/seconds"] = time.perf_counter() - start
        self.time_budget.book("free look", logged["odp/free/seconds"])
        with self.trying(host, "figures of a probe were not logged"):
            host.log(logged, None)

    def _together(self, host: Host, measure: Callable[[], ProbeReport | None]) -> ProbeReport | None:
        """What all processes measured, as one report, the same in all of them; None if nobody had a question.

        Nobody waits for another before all have measured; a process in which that failed says so, and the others'
        questions count.
        """
        try:
            part, error = measure(), None
        except Exception as found:
            if host.processes.size == 1:
                raise
            part, error = None, found
        told = host.processes.gather((part, None if error is None else f"{type(error).__name__}: {error}"))
        failed = {rank: message for rank, (_, message) in enumerate(told) if message is not None}
        parts = [found for found, _ in told if found is not None]
        if failed and (self.strict or not parts):
            if error is not None:
                raise error
            rank, message = next(iter(failed.items()))
            raise RuntimeError(f"in process {rank}: {message}")
        for rank, message in failed.items():
            self.say(host, f"a probe failed in process {rank}, and the others' questions count: {message}")
        return merge(parts) if parts else None

    def next_rows(self, batch: Any, processes: Processes) -> tuple[Sequence[str], Sequence[Row]]:
        """This process's part of the next questions, with stable ids; or of its batch.

        Their order is shuffled anew at each pass, alike in all processes.
        """
        if self.prompts is None:
            most = len(processes.share(range(self.questions_per_probe)))
            rows = rows_from_batch(batch)[:most] if most else []
            return [f"{self.last_probe}.{processes.rank}.{i}" for i in range(len(rows))], rows
        wanted = min(self.questions_per_probe, len(self.prompts))
        if len(self.order) < wanted:
            rest = set(self.order)
            shuffled = torch.randperm(len(self.prompts), generator=self.stream).tolist()
            self.order += [i for i in shuffled if i not in rest]
        chosen, self.order = self.order[:wanted], self.order[wanted:]
        own = processes.share(chosen)
        return [str(i) for i in own], [self.prompts[i] for i in own]

    def _observe(self, host: Host, report: ProbeReport) -> dict[str, float]:
        """Let the gate learn from a probe; what it now does, to be logged."""
        gate: Any = self.gate
        if not hasattr(gate, "observe"):
            return {}
        logged: dict[str, float] = {}
        with self.trying(host, "`gate` did not learn from a probe"):
            gate.observe(report)
            if hasattr(gate, "scalars"):
                logged.update(gate.scalars())
        return logged

    def _restore_gate(self) -> None:
        """A gate that is found only after the state was read gets its part then, once."""
        if self._gate_state is not None and hasattr(self.gate, "load_state_dict"):
            self.gate.load_state_dict(self._gate_state)
            self._gate_state = None

    def _update_teachers(self, step: int) -> None:
        assert self.probe is not None
        for teacher in self.teachers.values():
            teacher.update(self.probe.student, step)

    @contextmanager
    def trying(self, host: Host, otherwise: str) -> Iterator[None]:
        """What goes wrong in here is said once and then passed over, unless ``strict``."""
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            self.say(host, f"{otherwise}: {type(error).__name__}: {error}")

    def say(self, host: Host, message: str) -> None:
        """Warn once."""
        if message not in self._said:
            self._said.add(message)
            host.warn(f"odp-callbacks: {message}")
