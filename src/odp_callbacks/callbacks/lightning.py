"""The Lightning callback: probes a running on-policy distillation and logs what each teacher is worth."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import Unpack, override

from odp_callbacks.callbacks.headlines import Headlines, monitored_figures
from odp_callbacks.callbacks.logged_scalars import LoggedScalars
from odp_callbacks.callbacks.monitor import Monitor
from odp_callbacks.callbacks.names import named_metrics, refuse_equal_names, root_of
from odp_callbacks.callbacks.planned_steps import planned_steps
from odp_callbacks.callbacks.processes import current_processes
from odp_callbacks.callbacks.progress import ProbeProgress, display_beside
from odp_callbacks.callbacks.schedule import CallbackOptions, resolve_options
from odp_callbacks.callbacks.student_location import StudentLocator, locate_students
from odp_callbacks.callbacks.student_replica import ReplicaLoader
from odp_callbacks.callbacks.trainer_context import TrainerContext
from odp_callbacks.callbacks.training_prompts import training_template
from odp_callbacks.distillation import OnPolicyDistillation
from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.prompts import Row
from odp_callbacks.engine.rewards import RewardFunction
from odp_callbacks.records import ProbeReport
from odp_callbacks.visualization.loggers import ReportLogger, is_tensorboard

REFUSED_STRATEGIES = {"FSDPStrategy", "XLAStrategy", "XLAFSDPStrategy"}
"""Strategies that flatten parameters before they spread them, or whose processes torch.distributed does not know."""

HOOK_MODULES = {"lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks"}
"""Modules that define the hooks which a LightningModule inherits; ``is_overridden`` knows only one of the packages."""


class GradientAlignmentCallback(Callback):
    r"""Measure during training what each teacher's update gains, and on which tokens.

    Every ``every_n_steps`` optimizer steps, a probe takes some questions and samples the student's own rollouts. From
    their rewards it measures the update gain of each teacher and the influence of every response token. Unless
    ``budget=0``, it also estimates the ideal gradient at selected tokens by targeted continuations, and compares it
    with each teacher's distillation gradient on the LoRA parameters.

    The results are logged at the optimizer's step through the trainer's own loggers, as
    ``odp/update_gain/<teacher>/<all|correct|incorrect>`` with the ends ``_low`` and ``_high`` of its interval, as
    ``odp/step/…`` about the training's steps, and as ``odp/probe/…`` about the probe itself; ``log`` chooses more. In
    TensorBoard each teacher is a run of its own, and there are histograms and coloured rollouts.

    The callback preserves the training state: weights, gradients, optimizer, random streams, module modes and adapters
    are bit for bit what they would be without it. A probe that fails issues one warning, and training continues, unless
    ``strict``.

    Args:
        teachers: A mapping from name to teacher (:class:`~odp_callbacks.Teacher`, a model, ``"base"``, a context
            template), a list of teachers, or one teacher.
        prompts: The questions: rows with a ``prompt`` and the columns that the reward and the teachers' contexts need,
            as a list or any dataset with ``len`` and indexing. None: the rows of the current batch.
        reward: The verifier, a TRL reward function ``reward(prompts, completions, **columns) -> list[float]`` with
            values in [0, 1].
        student: Where the student is: a dotted path in the LightningModule, a function of the LightningModule, or None
            to find the only peft model in it.
        tokenizer: The student's tokenizer; None takes the LightningModule's ``tokenizer`` or ``processing_class``.
        gate: A gate that learns from the probes (:mod:`odp_callbacks.gates.protocols`): its ``observe(report)`` is
            called after every probe that succeeds, its ``scalars()`` are logged, and its state is kept in checkpoints.
            None: the LightningModule's ``gate``, if it has one with ``observe``.
        student_replica: A function without arguments that loads the student unsharded, for a training that shards it
            (FSDP2, ZeRO-3): the same base, in 4 bits for example, with LoRA of the same shapes. None (the default): the
            base is gathered from the shards once, and kept in each process's memory of the CPU.
        config: How a probe measures.
        **options: Fields of :class:`~odp_callbacks.callbacks.schedule.ProbeSchedule`, listed here, and fields of
            :class:`~odp_callbacks.ProbeConfig`, which replace those of ``config``.
        name: Tells this callback from the others in the same trainer, which need names of their own: its figures are
            logged as ``odp-<name>/…``, and its records are in ``<records>/<name>``. None (the default): ``odp/…`` and
            ``<records>``.
        every_n_steps: Number of optimizer steps between probes (100).
        questions_per_probe: Number of questions in a probe, taken from a shuffled order (8).
        max_overhead: The largest share of the training's wall-clock time that probes may take, in (0, 1) (0.1). A probe
            that would exceed it is limited to the time that is left, or skipped if that is less than half of what it
            takes. The first probe is limited to a quarter of what the planned length of the run allows. None: every
            probe runs in full.
        update_every_n_steps: Number of optimizer steps between measurements on the training's own rollouts:
            update gain at the cost of the gradients, without continuations. The rollouts are taken from the
            LightningModule's ``last_rollouts``, a list of :class:`~odp_callbacks.TrainingRollout` that it sets in each
            training step, as :class:`~odp_callbacks.OnPolicyDistillation` does. None (the default): no such
            measurements.
        step_gain_every_n_steps: Number of optimizer steps between the figures ``odp/step/…``: what the steps that the
            training took were expected to gain, if the LightningModule sets ``last_rollouts``, and their cosine with
            each teacher's last measured update. A figure takes one forward pass over the rollouts, two where these have
            no ``log_probs``. Where ``max_overhead`` leaves no time, the next one is of more steps. None: no such
            figures (1).
        pooled_decay: Share of the earlier probes' weight that is kept at each probe in the figures ``odp/pooled/…``, in
            (0, 1] (0.9). They pool update gain over the probes, with intervals that are valid at all probes together.
            The student changes, so earlier probes are forgotten; 1 forgets nothing.
        records: Folder in which each probe's records are saved as ``step-<step>``; see :mod:`odp_callbacks.storage`.
            None (the default): records are not saved.
        at_start: Also probe before the first step (False).
        on_validation: Also probe at the end of every validation, and in ``trainer.validate`` (False).
        log: Which scalars the loggers get: "main" for those that answer what users ask, at most 40 of three teachers,
            "all" for several hundred, or a list of figures to log besides the main ones, such as ``["alignment"]``
            ("main").
        confidence: Level of the intervals, in (0, 1) (0.95).
        seed: Seed of the callback's own random stream (0).
        strict: Raise the exception of a failing probe, instead of warning once (False).
        optimizer_geometry: Also measure in the geometry of Adam's next step, with its second moments as the
            preconditioner: metrics ``odp/adam/…`` from the same continuations, from the first optimizer step on
            (False).

    Raises:
        ValueError: Before training, if an argument is out of range or does not fit the others.
        TypeError: If an argument is unknown or of the wrong type. For an unknown one, the message names the closest
            valid argument and lists all of them.

    Examples:
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
        student: StudentLocator | None = None,
        tokenizer: Any = None,
        gate: object | None = None,
        student_replica: ReplicaLoader | None = None,
        config: ProbeConfig | None = None,
        **options: Unpack[CallbackOptions],
    ) -> None:
        arguments = ("teachers", "prompts", "reward", "student", "tokenizer", "gate", "student_replica", "config")
        schedule, config = resolve_options(config, options, other_arguments=arguments)
        self.monitor = Monitor(
            teachers, prompts, reward, schedule=schedule, config=config, gate=gate, student_replica=student_replica
        )
        self.logged_scalars = LoggedScalars(self.monitor)
        self.report_logger = ReportLogger(schedule.confidence, root_of(schedule.name))
        self._is_set_up = False
        self._stage = "fit"
        self.headlines = Headlines(self.teachers, root_of(schedule.name))
        self.student = student
        self.tokenizer = tokenizer

    @property
    def config(self) -> ProbeConfig:
        """How a probe measures."""
        return self.monitor.config

    @property
    def teachers(self) -> Mapping[str, Any]:
        """The teachers, by name."""
        return self.monitor.teachers

    @property
    def last_report(self) -> ProbeReport | None:
        """The report of the last probe that succeeded; None before any. A failed probe does not replace it."""
        return self.monitor.last_report

    def should_probe(self, step: int, last_step: int) -> bool:
        """Whether to probe after optimizer step ``step``; override this for a schedule of your own.

        Several optimizers can take more than one step in a batch, so that a multiple of ``every_n_steps`` may be
        jumped over; it counts, too.

        Args:
            step: Number of optimizer steps taken.
            last_step: The same number at the previous call.
        """
        return self.monitor.schedule.probe_is_due(step, last_step)

    @property
    @override
    def state_key(self) -> str:
        if self._is_set_up:
            return self._generate_state_key(name=self.monitor.schedule.name)
        # A new Trainer refuses equal keys without saying what to do. `setup` does it better, before any key is used.
        return self._generate_state_key(name=self.monitor.schedule.name, callback=id(self))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out that a trainer has set the callback up: a copy belongs to none."""
        return {**self.__dict__, "_is_set_up": False}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if not self._has_probes(stage):
            self._is_set_up = True
            return
        if refused := {kind.__name__ for kind in type(trainer.strategy).__mro__} & REFUSED_STRATEGIES:
            raise ValueError(
                f"`strategy` is {refused.pop()}, whose shards this callback cannot gather; use ModelParallelStrategy "
                "with `fully_shard` (FSDP2), DeepSpeed, DDP, or one device."
            )
        refuse_equal_names(
            self.monitor.schedule.name,
            [
                other.monitor.schedule.name
                for other in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(other, GradientAlignmentCallback) and other is not self
            ],
        )
        self._is_set_up = True
        # A module may build its student, tokenizer and gate in a `setup` or `configure_model` of its own. These run
        # after this, and before `on_fit_start`.
        if all(getattr(pl_module, hook).__module__ in HOOK_MODULES for hook in ("setup", "configure_model")):
            self._prepare(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_training(trainer) and self._has_probes("validate"):
            self._prepare(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor.is_new_run(trainer.global_step):
            self.headlines.clear()
        self._show_headlines(trainer)
        self._announce_columns(trainer)
        self.monitor.on_train_start(self.trainer_context(trainer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        training_rollouts = (lambda: module.last_rollouts) if hasattr(module, "last_rollouts") else None
        self.monitor.on_batch_end(self.trainer_context(trainer), batch, training_rollouts, self.should_probe)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.monitor.on_validation_end(self.trainer_context(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor.on_train_end(self.trainer_context(trainer))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.monitor.on_exception()
        self.report_logger.close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.report_logger.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self.monitor.state_dict(), "headlines": dict(self.headlines.values)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        continues_run = self._stage == "fit"
        if continues_run:
            self.headlines.restore(state_dict.get("headlines") if isinstance(state_dict, dict) else None)
        if self._has_probes(self._stage):
            self.monitor.load_state_dict(state_dict, continues_run=continues_run)

    def trainer_context(self, trainer: Trainer) -> TrainerContext:
        """Return the trainer as the monitor sees it."""
        return TrainerContext(
            step=trainer.global_step,
            is_global_zero=trainer.is_global_zero,
            processes=current_processes(),
            precision_context=trainer.precision_plugin.forward_context,
            progress=lambda last_seconds: ProbeProgress(
                display_beside(trainer.progress_bar_callback) if trainer.is_global_zero else None,
                rank_zero_info,
                last_seconds,
            ),
            log=lambda metrics, report: self._log(trainer, metrics, report),
            warn=rank_zero_warn,
            inform=rank_zero_info,
            optimizers=trainer.optimizers,
            is_training=_is_training(trainer),
            prepare=lambda: self._prepare(trainer.lightning_module),
            planned_steps=lambda: planned_steps(trainer),
        )

    def _has_probes(self, stage: str) -> bool:
        """Whether anything is probed in a stage of the trainer; where nothing is, nothing is checked."""
        return stage == "fit" or (stage == "validate" and self.monitor.schedule.on_validation)

    def _prepare(self, pl_module: LightningModule) -> None:
        """Find the student and its tokenizer, and check everything that can be checked before training."""
        module_name = type(pl_module).__name__
        students = locate_students(pl_module, self.student)
        if len(students) != 1:
            raise ValueError(
                f"`student` must be one peft model, but {len(students)} were found in {module_name}; wrap the student "
                "with peft.get_peft_model, or give its dotted path or a function as `student`."
            )
        tokenizer = self.tokenizer
        for attribute in ("tokenizer", "processing_class"):
            tokenizer = getattr(pl_module, attribute, None) if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                f"`tokenizer` was not given, and {module_name} has neither `tokenizer` nor `processing_class`; give "
                "the student's tokenizer."
            )
        if self.monitor.schedule.update_every_n_steps is not None and not hasattr(pl_module, "last_rollouts"):
            raise ValueError(
                f"`update_every_n_steps` was given, but {module_name} has no `last_rollouts`; set it in each training "
                "step to a list of `TrainingRollout`, or give None."
            )
        distilled_teachers = tuple(pl_module.teachers) if isinstance(pl_module, OnPolicyDistillation) else ()
        gate, template = getattr(pl_module, "gate", None), training_template(pl_module)
        self.monitor.prepare(students[0], tokenizer, gate, distilled_teachers, template)

    def _log(self, trainer: Trainer, metrics: dict[str, float], report: ProbeReport | None) -> None:
        """Log to every logger at the optimizer's step, and to the metrics that other callbacks read."""
        step, is_training = trainer.global_step, _is_training(trainer)
        context = self.trainer_context(trainer)
        monitored = monitored_figures(trainer, root_of(self.monitor.schedule.name))
        scalars = self.logged_scalars.selected(metrics, monitored)
        charted = self.logged_scalars.for_tensorboard(metrics, monitored)
        if report is not None:
            self.logged_scalars.explain(context, metrics, tensorboard=any(map(is_tensorboard, trainer.loggers)))
        metrics = named_metrics(metrics, self.monitor.schedule.name)
        with self.monitor.failures.guarded(context, "failed to show the headlines of a probe to other callbacks"):
            self._update_headlines(trainer, metrics, report)
        for logger in trainer.loggers:
            with self.monitor.failures.guarded(context, f"{type(logger).__name__} refused the metrics of a probe"):
                shown = charted if is_tensorboard(logger) else scalars
                self.report_logger.log_scalars(logger, shown, list(self.teachers), step, is_training=is_training)
            if report is not None and trainer.is_global_zero:
                try:
                    self.report_logger.log(logger, report, step, is_training=is_training)
                except Exception as error:  # even if `strict`: the figures themselves were logged
                    self.monitor.failures.warn_of_error(context, "failed to log the pictures of a probe", error)

    def _update_headlines(self, trainer: Trainer, metrics: dict[str, float], report: ProbeReport | None) -> None:
        """Take the headlines of a probe, which belong to the training only if there is one."""
        headlines, root = self.headlines, root_of(self.monitor.schedule.name)
        if not _is_training(trainer):
            headlines = Headlines(self.teachers, root)
        worst_values = monitored_figures(trainer, root)
        headlines.update(metrics, worst_values)
        trainer.callback_metrics.update(headlines.shown(worst_values if _is_training(trainer) else {}))
        if report is not None and (complaint := headlines.unknown(worst_values, metrics)):
            self.monitor.failures.warn_once(self.trainer_context(trainer), complaint)

    def _announce_columns(self, trainer: Trainer) -> None:
        """Name the scalars to loggers that write a table, whose columns then stay the same.

        A logger that refuses them will refuse the metrics of the first probe too, which is warned about.
        """
        columns = self.logged_scalars.columns(monitored_figures(trainer, root_of(self.monitor.schedule.name)))
        for logger in trainer.loggers:
            with suppress(Exception):
                self.report_logger.announce(logger, columns, trainer.global_step)

    def _show_headlines(self, trainer: Trainer) -> None:
        """Show the headlines before the first probe."""
        worst_values = monitored_figures(trainer, root_of(self.monitor.schedule.name))
        trainer.callback_metrics.update(self.headlines.shown(worst_values))


def _is_training(trainer: Trainer) -> bool:
    """Whether a trainer fits a module, rather than validating, testing or predicting."""
    return trainer.state.fn == "fit"
