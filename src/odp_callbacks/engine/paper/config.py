"""The options of the paper's protocol, with the paper's values as defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from odp_callbacks.analysis.paper.prefix_tree import Ancestors, OwnPath, check_counting
from odp_callbacks.engine.config import ProbeConfig, check_option_names
from odp_callbacks.engine.engines.interface import SamplingEngine

PUBLISHED = {
    "rollouts_per_question": ("G, the rollouts of a question,", 200),
    "enriched_visits": ("N_min, the visits of an enriched token,", 100),
    "minimum_visits": ("the visits of a token that is scored", 20),
    "first_window": ("the first window of depth", 50),
    "enrichment_threshold": ("the probability of a token worth enriching", 0.02),
    "paths_per_class": ("the representative paths of a class", 2),
    "temperature": ("the temperature", 1.0),
    "own_path": ("the path's own rollout among its visits", "counted"),
    "ancestors": ("targeted rollouts at ancestors", "counted"),
}
"""For each option that the paper publishes, its name in a sentence and the paper's value."""
SHARED = (
    "max_new_tokens",
    "temperature",
    "eos_token_ids",
    "chat_template",
    "chat_template_kwargs",
    "tools",
    "success_threshold",
    "batch_size",
    "max_memory_bytes",
    "reward_timeout",
    "reward_processes",
    "engine",
)
"""Options with the meaning and the checks that they have in :class:`~odp_callbacks.engine.config.ProbeConfig`."""
COUNTS = ("rollouts_per_question", "enriched_visits", "minimum_visits", "first_window", "paths_per_class")
RANKED = ("by_gradient", "by_difference")


@dataclass(frozen=True)
class PaperConfig:
    """How a question is measured by the protocol of arXiv:2605.10889.

    Every default that the paper publishes is the paper's. A record names the options that differ from it.

    Attributes:
        rollouts_per_question: G, the number of the student's rollouts for each question. The paper's is 200.
        enriched_visits: N_min, the number of visits that targeted rollouts bring an enriched token to. The paper's is
            100.
        minimum_visits: Visits that a token needs to be scored. The paper's is 20, or 40 on AIME.
        first_window: Width of the first window of depth, in tokens. The paper's is 50.
        by_gradient: k, the tokens of each window that are chosen by the size of the GKD gradient on the logits. The
            paper does not publish it.
        by_difference: r, the tokens of each window that are chosen by the difference of the two policies. The paper
            does not publish it.
        enrichment_threshold: A token is enriched if student or a teacher gives it more probability. The paper's is
            0.02.
        paths_per_class: Number of correct and of incorrect paths for each question. The paper's is 2.
        own_path: ``"counted"``: a path's own rollout is one of the visits of its tokens, as in the paper.
            ``"left out"``: it is not. Both can be computed from one record.
        ancestors: ``"counted"``: a targeted rollout counts at all nodes before its forced token, as in the paper.
            ``"own policy only"``: it does not. Both can be computed from one record.
        renormalise: Whether the student's probabilities are renormalised over the scored tokens before the gradients
            are taken. With two tokens the score is then a sign, as the paper's nearly are; it does not say.
        max_new_tokens: Maximum length of a response in tokens.
        temperature: Sampling temperature; it also divides the logits of both models. The paper's is 1.
        eos_token_ids: Additional tokens that end a response.
        chat_template: Template in place of the tokenizer's own.
        chat_template_kwargs: Options of the chat template, such as ``{"enable_thinking": False}``.
        tools: Functions, or JSON schemas of functions, that the chat template shows the model.
        success_threshold: Smallest reward that is a success, in (0, 1].
        batch_size: Maximum number of sequences sampled at a time; fewer where memory is short.
        max_memory_bytes: Maximum number of bytes that continuations may take at a time. None allows half of what is
            free.
        reward_timeout: Maximum number of seconds that one call of the reward function may take; None sets no limit.
        reward_processes: Number of processes in which the reward function is called, as in
            :class:`~odp_callbacks.engine.config.ProbeConfig`.
        engine: What samples, as in :class:`~odp_callbacks.engine.config.ProbeConfig`.

    Raises:
        ValueError: If an option is out of range; the message says what would work.

    Examples:
        >>> PaperConfig(rollouts_per_question=32).deviations()
        ('G, the rollouts of a question, = 32 instead of 200',)
    """

    rollouts_per_question: int = 200
    enriched_visits: int = 100
    minimum_visits: int = 20
    first_window: int = 50
    by_gradient: int = 2
    by_difference: int = 2
    enrichment_threshold: float = 0.02
    paths_per_class: int = 2
    own_path: OwnPath = "counted"
    ancestors: Ancestors = "counted"
    renormalise: bool = True
    max_new_tokens: int = 128
    temperature: float = 1.0
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
        for option in (*COUNTS, *RANKED):
            given, smallest = getattr(self, option), int(option in COUNTS)
            if isinstance(given, bool) or not isinstance(given, int) or given < smallest:
                raise ValueError(f"`{option}` must be an integer of at least {smallest}, but {given!r} was given.")
        if not 0 <= self.enrichment_threshold < 1:
            raise ValueError(
                f"`enrichment_threshold` must be a probability in [0, 1), but {self.enrichment_threshold!r} was given."
            )
        if not isinstance(self.renormalise, bool):
            raise ValueError(f"`renormalise` must be True or False, but {self.renormalise!r} was given.")
        check_counting(self.own_path, self.ancestors)
        _ = self.shared  # checks its own options

    @property
    def shared(self) -> ProbeConfig:
        """The options that have the same meaning in every probe."""
        return ProbeConfig(**{option: getattr(self, option) for option in SHARED})

    def settings(self) -> dict[str, Any]:
        """The options as a record keeps them; functions are replaced by their names."""
        of_protocol = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in SHARED}
        recorded = self.shared.settings()
        return {**of_protocol, **{option: recorded[option] for option in SHARED}}

    def deviations(self) -> tuple[str, ...]:
        """The options that differ from the paper's published values, as sentences."""
        return tuple(
            f"{description} = {getattr(self, option)} instead of {published}"
            for option, (description, published) in PUBLISHED.items()
            if getattr(self, option) != published
        )

    def unpublished(self) -> tuple[str, ...]:
        """What the paper does not publish, and what is done here, as sentences."""
        return (
            f"k = {self.by_gradient} tokens a window are ranked by the norm of the GKD gradient on all logits",
            f"r = {self.by_difference} tokens a window are ranked by the total variation of the two policies",
            "the tokens that rank for any teacher on any representative path are enriched",
            "representative paths are the first different rollouts of each class",
            "targeted rollouts are planned at once, from the visits of the G rollouts",
            f"student probabilities over the scored tokens are {'' if self.renormalise else 'not '}renormalised",
            f"responses have at most {self.max_new_tokens} tokens",
            "intervals are Student's t over questions",
        )


def resolve_paper_config(config: PaperConfig | None, options: Mapping[str, Any]) -> PaperConfig:
    """Combine a configuration with options that were given as keyword arguments.

    Args:
        config: The configuration to start from; None starts from the paper's values.
        options: Fields of :class:`PaperConfig` that replace those of ``config``.

    Raises:
        TypeError: If ``config`` is not a :class:`PaperConfig`, or an option is unknown.
        ValueError: If an option is out of range.

    Examples:
        >>> resolve_paper_config(None, {"rollouts": 32})
        Traceback (most recent call last):
        ...
        TypeError: unknown option `rollouts` of protocol "paper"; did you mean `rollouts_per_question`? Valid ...
    """
    if config is not None and not isinstance(config, PaperConfig):
        raise TypeError(f'`config` must be a PaperConfig for protocol "paper", but {config!r} was given.')
    valid = {field.name for field in fields(PaperConfig)}
    check_option_names(options, valid, described=' of protocol "paper"', similarity=0.4)
    return replace(config or PaperConfig(), **options)
