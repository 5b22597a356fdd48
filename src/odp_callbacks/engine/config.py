"""The configuration of a probe: what it samples, where it measures, and what it may spend."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from typing_extensions import TypedDict

from odp_callbacks.engine.chat_template import are_tools
from odp_callbacks.engine.engines.choice import check_engine, engine_label
from odp_callbacks.engine.engines.interface import SamplingEngine
from odp_callbacks.engine.gradients.loss_directions import UserLoss
from odp_callbacks.engine.tree.allocation import TARGETS
from odp_callbacks.engine.tree.nodes import NODE_SELECTORS, BalancedNodes, NodeSelector
from odp_callbacks.engine.update.response_tokens import Rule, check_rules
from odp_callbacks.functional.distillation_losses import Divergence, check_divergence

SIMPLE_TYPES = (str, int, float, tuple, type(None))
"""Types of option values that a record can hold as they are."""
USUAL_ROLLOUTS, USUAL_NODES = 4, "balanced"
"""What is measured where neither the user nor a plan says otherwise."""
COUNTS = ("rollouts_per_question", "max_new_tokens", "continuations", "max_branches", "tail_draws", "batch_size")
"""Options that must be positive integers."""
LIMITS = ("seconds", "half_width", "max_memory_bytes", "reward_timeout")
"""Options that must be positive finite numbers or None."""
SHARES = ("branch_mass", "success_threshold", "differing_gradients", "agreeing_gradients")
"""Options that must lie in (0, 1]."""
OPTIONAL_SHARES = ("teacher_branch_probability", "tail_roulette")
"""Options that must lie in (0, 1), or None."""


class ProbeOptions(TypedDict, total=False):
    """The fields of :class:`ProbeConfig` as keyword arguments, for editors and type checkers."""

    rollouts_per_question: int | None
    max_new_tokens: int
    temperature: float
    continuations: int
    budget: int | None
    seconds: float | None
    target: str
    half_width: float | None
    step_alignment: bool
    update: bool
    influence: bool
    rules: Mapping[str, Rule] | None
    nodes: NodeSelector | int | str | None
    branch_mass: float
    max_branches: int
    tail_draws: int
    teacher_branch_probability: float | None
    tail_roulette: float | None
    differing_gradients: float
    agreeing_gradients: float
    projections: int | None
    divergence: Divergence | UserLoss
    beta: float | None
    top_k: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    tools: list[Any] | None
    success_threshold: float
    batch_size: int
    max_memory_bytes: float | None
    reward_timeout: float | None
    reward_processes: int
    engine: SamplingEngine | str


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe measures.

    :class:`ProbeOptions` has the same fields, for functions that take them as keyword arguments.

    Attributes:
        rollouts_per_question: Number of student responses to each question. None: 4; from the second probe with
            ``seconds`` on, as many as :func:`~odp_callbacks.plan_probe` says.
        max_new_tokens: Maximum length of a response in tokens.
        temperature: Sampling temperature. It also divides the logits of both models in a named distillation loss.
        continuations: Number of continuations sampled from each branch. It applies where neither ``budget`` nor
            ``seconds`` is given.
        budget: Number of tokens to spend on continuations, met to within 5 %. Every branch first gets one
            continuation; the others go to the branches where they narrow the interval of ``target`` most. If one
            continuation per branch costs too much of the budget, a random subset of the nodes is measured. With 0, no
            node is measured and no continuation sampled: update gain and token influence need rollouts only.
        seconds: Number of seconds that the whole probe may take, from rollouts to gradients. Where it is too short,
            responses are cut at a common length and whole questions are left out, and the report and a message say
            so. With nodes it also limits continuations, which are distributed like those of a ``budget``; with both,
            sampling stops at whichever is reached first. None: no limit.
        target: The figure whose interval a budget narrows: ``"predicted_gain"``, ``"gain_weighted_alignment"`` or
            ``"alignment"``.
        half_width: Stop before the budget is spent, once the 95 % interval of ``target`` over all nodes has at most
            this half-width for every teacher.
        step_alignment: Whether to also measure the cosine of the summed gradients. It costs one more forward and
            backward pass for each rollout.
        update: Whether to measure the update gain of each teacher: what one step along the distillation gradient of
            the probe's rollouts adds to the success of other questions. It needs no continuations.
        influence: Whether to also measure the influence of every response token on that gain.
        rules: Rules for where to distil, whose update gain is measured too, as functions by name (such as
            ``odp_callbacks.gates.RULES``); :func:`~odp_callbacks.score_rules` reads it. Each rule that weights by more
            than correctness takes a forward pass and, for each teacher, a backward pass. None measures no rule.
        nodes: Which response positions are measured: ``"balanced"`` (nearly equal weights, every depth), or the number
            of balanced ones in each response; one in each of the ``"exponential"`` windows, ``"every"``, ``"uniform"``,
            ``"entropy"``; or a :data:`~odp_callbacks.engine.tree.nodes.NodeSelector` function. None: ``"balanced"``;
            from the second probe with ``seconds`` on, as many as :func:`~odp_callbacks.plan_probe` says.
        branch_mass: Total probability that the most likely branches of a node must reach, in (0, 1].
        max_branches: Maximum number of most likely branches of a node.
        tail_draws: Number of tokens drawn from the remaining probability mass at each node.
        teacher_branch_probability: Tokens to which a teacher gives more than this probability are branches too, at most
            ``max_branches`` of them. None: only tokens that the student chose or may choose.
        tail_roulette: Where the remaining mass is smaller than this, tokens are drawn from it with the probability
            ``mass / tail_roulette`` only, and weigh more in return. None always draws.
        differing_gradients: Share of the nodes whose gradients are computed, among those where outcomes differ but no
            alignment is decided. They are drawn by the size of the ideal gradient on the logits, and stand for the
            others; where an alignment is decided on the logits, gradients are always computed. In (0, 1].
        agreeing_gradients: The same among the nodes where all outcomes agree, which have no gain whatever their
            gradients are. In (0, 1].
        projections: Number of random directions that gradients are projected on with ``nodes="every"``, wherever
            projection is cheaper (long responses). The cosine at a node then has a standard error of about
            ``1 / sqrt(projections)``, and modules are not told apart. None never projects.
        divergence: Name of the distillation loss, or a function ``f(student_logits, teacher_logits)`` from
            ``(N, V)`` to ``(N,)``.
        beta: Mixture weight of ``divergence="jsd"``, in [0, 1].
        top_k: Number of tokens that a named loss is restricted to; None uses the whole vocabulary.
        eos_token_ids: Additional tokens that end a response.
        chat_template: Template in place of the tokenizer's own; None for the tokenizer's, or that of the training.
        chat_template_kwargs: Options of the chat template, such as ``{"enable_thinking": False}``; None for those of
            the training. A row's own column ``chat_template_kwargs`` is used, too.
        tools: Functions, or JSON schemas of functions, that the chat template shows the model; None for those of the
            training. A row's own column ``tools`` is used, too.
        success_threshold: Smallest reward at which a rollout counts as correct, in (0, 1].
        batch_size: Maximum number of sequences sampled at a time; fewer where memory is short.
        max_memory_bytes: Maximum number of bytes, by an estimate, that continuations or gradients may take at a time.
            Where the graph of all layers takes more, layers are computed again one by one in the backward passes. None
            allows half of what is free.
        reward_timeout: Maximum number of seconds that one call of the reward function may take; None sets no limit.
        reward_processes: Number of processes in which the reward function is called, for one that is slow or that
            fails outside the main thread; it must be a function of a module. 0 calls it in the probe's own process.
        engine: What samples from the student: ``"local"``, the student's own model; the address of a vLLM
            server; ``"trainer"``, the vLLM engine of TRL's trainer; a ``vllm.LLM``; or an object with the methods of
            :class:`~odp_callbacks.engine.engines.SamplingEngine`.

    Raises:
        ValueError: If an option is out of range; the message says what would work.

    Examples:
        >>> ProbeConfig(max_new_tokens=256, budget=10_000).adaptive
        True
    """

    rollouts_per_question: int | None = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    continuations: int = 4
    budget: int | None = None
    seconds: float | None = None
    target: str = "predicted_gain"
    half_width: float | None = None
    step_alignment: bool = True
    update: bool = True
    influence: bool = True
    rules: Mapping[str, Rule] | None = None
    nodes: NodeSelector | int | str | None = None
    branch_mass: float = 0.95
    max_branches: int = 4
    tail_draws: int = 2
    teacher_branch_probability: float | None = 0.02
    tail_roulette: float | None = 0.05
    differing_gradients: float = 0.5
    agreeing_gradients: float = 0.1
    projections: int | None = 256
    divergence: Divergence | UserLoss = "reverse_kl"
    beta: float | None = None
    top_k: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    success_threshold: float = 1.0
    batch_size: int = 256
    max_memory_bytes: float | None = None
    reward_timeout: float | None = 120.0
    reward_processes: int = 0
    engine: SamplingEngine | str = "local"

    def __post_init__(self) -> None:
        """Check every field."""
        for option in COUNTS:
            given = getattr(self, option)
            is_open = given is None and option == "rollouts_per_question"
            if not is_open and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
                raise ValueError(f"`{option}` must be a positive integer, but {given!r} was given.")
        if type(self.reward_processes) is not int or self.reward_processes < 0:
            raise ValueError(
                f"`reward_processes` must be a number of processes or 0, but {self.reward_processes!r} was given."
            )
        if self.projections is not None and (type(self.projections) is not int or self.projections < 2):
            raise ValueError(f"`projections` must be an integer above 1 or None, but {self.projections!r} was given.")
        if self.budget is not None and (type(self.budget) is not int or self.budget < 0):
            raise ValueError(
                f"`budget` must be a number of tokens, 0 for no continuations, or None, but {self.budget!r} was given."
            )
        for option in LIMITS:
            given = getattr(self, option)
            if given is not None and not 0 < given < float("inf"):
                raise ValueError(f"`{option}` must be a positive number or None, but {given!r} was given.")
        if self.half_width is not None and not self.adaptive:
            raise ValueError("`half_width` needs a `budget` or `seconds` to stop before, but neither was given.")
        for option in ("update", "influence"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"`{option}` must be True or False, but {getattr(self, option)!r} was given.")
        if self.rules is not None:
            check_rules(self.rules)
            if not self.update:
                raise ValueError("`rules` is given, but `update` is False; rules are measured as parts of the update.")
        if not self.update and not self.measures_nodes:
            raise ValueError("`update` is False and `budget` is 0, so nothing would be measured; change one of them.")
        if self.target not in TARGETS:
            raise ValueError(f"`target` must be one of {list(TARGETS)}, but {self.target!r} was given.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be a positive number, but {self.temperature!r} was given.")
        for option in OPTIONAL_SHARES:
            given = getattr(self, option)
            if given is not None and not 0 < given < 1:
                raise ValueError(f"`{option}` must lie in (0, 1) or be None, but {given!r} was given.")
        for option in SHARES:
            if not 0 < getattr(self, option) <= 1:
                raise ValueError(f"`{option}` must lie in (0, 1], but {getattr(self, option)!r} was given.")
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise ValueError(f"`chat_template` must be a template or None, but {self.chat_template!r} was given.")
        if self.chat_template_kwargs is not None and not isinstance(self.chat_template_kwargs, Mapping):
            raise ValueError(
                "`chat_template_kwargs` must be a mapping such as {'enable_thinking': False} or None, but "
                f"{self.chat_template_kwargs!r} was given."
            )
        if self.tools is not None and not are_tools(self.tools):
            raise ValueError(f"`tools` must be a list of functions or JSON schemas, but {self.tools!r} was given.")
        is_count = type(self.nodes) is int and self.nodes > 0
        if not (self.nodes is None or callable(self.nodes) or is_count or self.nodes in NODE_SELECTORS):
            raise ValueError(
                f"`nodes` must be one of {list(NODE_SELECTORS)}, a positive number or a function, but got "
                f"{self.nodes!r}."
            )
        check_engine(self.engine)
        if not callable(self.divergence):
            check_divergence(self.divergence, self.beta, self.top_k)

    @property
    def measures_nodes(self) -> bool:
        """Whether single tokens are measured by continuations."""
        return self.budget != 0

    @property
    def adaptive(self) -> bool:
        """Whether continuations are allocated to the branches where they help most, within a budget."""
        return bool(self.budget) or (self.seconds is not None and self.measures_nodes)

    @property
    def selector(self) -> NodeSelector:
        """The function that selects a rollout's nodes."""
        nodes = USUAL_NODES if self.nodes is None else self.nodes
        if isinstance(nodes, int):
            return BalancedNodes(nodes)
        return NODE_SELECTORS[nodes] if isinstance(nodes, str) else nodes

    @property
    def rollouts(self) -> int:
        """Number of rollouts of a question; the usual one where it is open."""
        return USUAL_ROLLOUTS if self.rollouts_per_question is None else self.rollouts_per_question

    @property
    def has_open_numbers(self) -> bool:
        """Whether a plan may choose how many rollouts or nodes are measured."""
        return self.rollouts_per_question is None or self.nodes is None

    def with_numbers(
        self, rollouts_per_question: int = USUAL_ROLLOUTS, nodes: NodeSelector | int | str = USUAL_NODES
    ) -> "ProbeConfig":
        """Fill in the numbers that are open, and keep the others.

        Args:
            rollouts_per_question: Number of rollouts of a question.
            nodes: Which positions are measured.

        Examples:
            >>> ProbeConfig(nodes=3).with_numbers(rollouts_per_question=8, nodes=5).nodes
            3
        """
        return replace(
            self,
            rollouts_per_question=self.rollouts_per_question or rollouts_per_question,
            nodes=nodes if self.nodes is None else self.nodes,
        )

    def settings(self) -> dict[str, Any]:
        """The options as a record keeps them; functions are replaced by their names."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        options["rules"] = None if self.rules is None else tuple(self.rules)
        options["engine"] = engine_label(self.engine)
        return {option: _recordable(setting) for option, setting in options.items()}


def _recordable(setting: Any) -> Any:
    """A setting as a record keeps it."""
    if isinstance(setting, list):
        return str([_recordable(entry) for entry in setting])
    return setting if isinstance(setting, SIMPLE_TYPES) else getattr(setting, "__qualname__", repr(setting))


def resolve_config(
    config: ProbeConfig | None, options: Mapping[str, Any], *, other_arguments: Collection[str] = ()
) -> ProbeConfig:
    """Combine a configuration with options that were given as keyword arguments.

    Args:
        config: The configuration to start from; None starts from the defaults.
        options: Fields of :class:`ProbeConfig` that replace those of ``config``.
        other_arguments: Names of the caller's own keyword arguments. The error for an unknown option lists them too.

    Returns:
        ``config`` with the options replaced.

    Raises:
        TypeError: If ``config`` is not a :class:`ProbeConfig`, or an option is unknown. The message names the closest
            valid option and lists all of them.
        ValueError: If an option is out of range.

    Examples:
        >>> resolve_config(ProbeConfig(max_new_tokens=64), {"temperature": 0.7}).max_new_tokens
        64
        >>> resolve_config(None, {"temprature": 0.7})
        Traceback (most recent call last):
        ...
        TypeError: unknown option `temprature`; did you mean `temperature`? Valid options are agreeing_gradients, ...
    """
    if config is not None and not isinstance(config, ProbeConfig):
        raise TypeError(
            f"`config` must be a ProbeConfig, but {config!r} was given; use `ProbeConfig(...)`, or keyword arguments."
        )
    check_option_names(options, {field.name for field in fields(ProbeConfig)}, other_arguments=other_arguments)
    return replace(config or ProbeConfig(), **options)


def check_option_names(
    options: Mapping[str, Any],
    valid: Collection[str],
    *,
    other_arguments: Collection[str] = (),
    described: str = "",
    similarity: float = 0.6,
) -> None:
    """Raise ``TypeError`` for an option that does not exist, with the closest valid one and a list of all.

    Args:
        options: Options by name.
        valid: Names of the options that exist.
        other_arguments: Names that the error lists, too.
        described: What the options are those of, for the error.
        similarity: How similar a name must be to be suggested, in [0, 1].
    """
    if unknown_options := sorted(set(options) - set(valid)):
        listed = sorted({*valid, *other_arguments})
        closest = get_close_matches(unknown_options[0], listed, n=1, cutoff=similarity)
        suggestion = f"did you mean `{closest[0]}`? " if closest else ""
        raise TypeError(
            f"unknown option `{unknown_options[0]}`{described}; {suggestion}Valid options are {', '.join(listed)}."
        )
