"""Demonstrations: correct and wrong responses to each question, sampled from a model and verified.

The procedure is that of arXiv:2605.10889: responses are sampled at temperature 0.7 and verified, up to 60 a question,
until there are as many as a context needs. Questions that no response solves have no demonstration.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.demonstration_store import DemonstrationStore
from odp_callbacks.engine.engines.choice import as_engine
from odp_callbacks.engine.engines.interface import SamplingEngine
from odp_callbacks.engine.engines.student_engine import StudentEngine, prepared_engine
from odp_callbacks.engine.prompts import Question, Row, as_questions, check_length
from odp_callbacks.engine.rewards import RewardFunction, check_columns, check_reward
from odp_callbacks.engine.rollouts import Rollout, end_tokens, sample_rollouts, score_rollouts
from odp_callbacks.engine.rows import as_rows
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teachers.demonstration_contexts import DEMONSTRATIONS, WRONG_DEMONSTRATIONS, source_column
from odp_callbacks.engine.timing import Progress
from odp_callbacks.engine.training_state import preserving_training_state
from odp_callbacks.engine.verifier import Verifier

FIRST_ROUND = 4
"""Responses to each question in the first round; each further round has twice as many."""


@dataclass(frozen=True)
class DemonstrationOptions:
    """How demonstrations are sampled.

    Attributes:
        correct: Number of correct responses to find for each question.
        wrong: Number of wrong ones.
        tries: Number of responses to each question, at most.
        temperature: Sampling temperature.
        max_new_tokens: Maximum length of a response in tokens. One that is cut there is a try, but no demonstration.
        success_threshold: Smallest reward of a correct response.
        eos_token_ids: Additional tokens that end a response.
        chat_template_kwargs: Options of the chat template, such as ``{"enable_thinking": True}``.
        batch_size: Maximum number of responses sampled at a time.
        engine: What samples: ``"local"``, the model itself; the address of a vLLM server; a ``vllm.LLM``; or an object
            with the methods of :class:`~odp_callbacks.engine.engines.SamplingEngine`. It has the model's base, and
            gets its adapter if there is one.

    Raises:
        ValueError: If an option is out of range.
    """

    correct: int = 1
    wrong: int = 1
    tries: int = 60
    temperature: float = 0.7
    max_new_tokens: int = 512
    success_threshold: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    engine: SamplingEngine | str = "local"

    def __post_init__(self) -> None:
        for name in ("tries", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive integer, but {getattr(self, name)!r} was given.")
        if min(self.correct, self.wrong) < 0 or self.correct + self.wrong == 0:
            raise ValueError(
                "`correct` and `wrong` must be numbers of demonstrations, at least one of them positive, but "
                f"{self.correct} and {self.wrong} were given."
            )
        if not 0 < self.success_threshold <= 1:
            raise ValueError(f"`success_threshold` must lie in (0, 1], but {self.success_threshold!r} was given.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be a positive number, but {self.temperature!r} was given.")
        as_engine(self.engine)  # checks it

    def prepared_engine(
        self, model: nn.Module, questions: Sequence[Question], stop_token_ids: Sequence[int], randomness: Randomness
    ) -> AbstractContextManager[StudentEngine | None]:
        """The engine with the model's policy, while it samples; None where the model samples itself.

        Args:
            model: In evaluation mode.
            questions: What it will be asked; without any, the engine is left alone.
            stop_token_ids: Tokens that end a response.
            randomness: The source of all random draws.
        """
        return prepared_engine(
            as_engine(self.engine),
            model,
            questions,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=stop_token_ids,
            randomness=randomness,
        )

    def identity(self) -> dict[str, Any]:
        """The options that decide which responses are demonstrations."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("batch_size", "engine")}


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations of one question.

    Attributes:
        correct: Different correct responses, in the order in which they were sampled.
        wrong: Different wrong ones.
        tries: How many responses were looked at, up to the one that completed the demonstrations.
        successes: How many of these were correct. Their share is no estimate of the pass rate, because looking stops
            at a success.
    """

    correct: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    tries: int = 0
    successes: int = 0

    def is_complete(self, options: DemonstrationOptions) -> bool:
        """Whether there are as many as asked for."""
        return len(self.correct) >= options.correct and len(self.wrong) >= options.wrong

    def with_try(self, rollout: Rollout, options: DemonstrationOptions) -> "Demonstrations":
        """The demonstrations after one more response.

        Args:
            rollout: The response with its reward; one without a reward is neither correct nor wrong.
            options: What is asked for.
        """
        is_correct = rollout.reward >= options.success_threshold
        is_wrong = rollout.reward < options.success_threshold  # NaN is neither
        counted = replace(self, tries=self.tries + 1, successes=self.successes + is_correct)
        if rollout.truncated or not rollout.text.strip() or rollout.text in (*self.correct, *self.wrong):
            return counted
        if is_correct and len(self.correct) < options.correct:
            return replace(counted, correct=(*self.correct, rollout.text))
        if is_wrong and len(self.wrong) < options.wrong:
            return replace(counted, wrong=(*self.wrong, rollout.text))
        return counted


def sample_demonstrations(
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    reward: RewardFunction,
    options: DemonstrationOptions | None = None,
    *,
    seed: int = 0,
    store: DemonstrationStore | None = None,
    progress: Progress | None = None,
) -> list[Demonstrations]:
    """Sample responses to questions until there are enough correct and wrong ones, or the tries are used up.

    The responses to a question depend on the seed and on the question alone, whatever the other questions and the batch
    size are. Weights, modes and random streams of the model are afterwards as they were before.

    Args:
        model: The student, or another causal language model.
        tokenizer: Its tokenizer.
        rows: Questions in TRL's convention.
        reward: The verifier, a TRL reward function.
        options: How to sample; None for the defaults, which are the paper's.
        seed: Seed of all random draws.
        store: Keeps the questions that are done; those that it holds with the same options are not sampled again.
        progress: Called with the stage's name, the number of questions done, and their number.

    Returns:
        The demonstrations of each question, in the order of ``rows``; fewer than asked for where the tries did not give
        them.

    Raises:
        TypeError: If ``reward`` is not a function.
        EngineError: If the engine does not sample from the model.
        ValueError: If a row has no prompt, is too long, or lacks a column of the reward function.
    """
    options = options or DemonstrationOptions()
    check_reward(reward)
    questions = _encode(model, tokenizer, rows, reward, options)
    keys = [_key(store, question, options, seed) for question in questions]
    stored = {} if store is None else store.entries
    complete = {place: _from_entry(stored[key]) for place, key in enumerate(keys) if key in stored}
    missing = [place for place in range(len(questions)) if place not in complete]
    block_size = max(1, options.batch_size // FIRST_ROUND)
    report = progress or (lambda stage, done, total: None)
    report("demonstrations", len(complete), len(questions))
    eos_token_ids, randomness = end_tokens(model, tokenizer, options.eos_token_ids), Randomness(seed)
    with (
        preserving_training_state(model),
        closing(Verifier(reward)) as verifier,
        options.prepared_engine(model, [questions[place] for place in missing], eos_token_ids, randomness) as engine,
    ):
        sampler = _Sampler(model, tokenizer, verifier, options, eos_token_ids, randomness, engine)
        for first in range(0, len(missing), block_size):
            places = missing[first : first + block_size]
            sampled = sampler.sample([questions[place] for place in places])
            for place, demonstrations in zip(places, sampled, strict=True):
                complete[place] = demonstrations
                if store is not None:
                    store.write(keys[place], asdict(demonstrations))
            report("demonstrations", len(complete), len(questions))
    return [complete[place] for place in range(len(questions))]


def demonstration_columns(demonstrations: Demonstrations, model_name: str, source: str = "") -> dict[str, Any]:
    """The columns of a row that hold its demonstrations, for the contexts of teachers.

    Args:
        demonstrations: The demonstrations.
        model_name: The model that they were sampled from.
        source: Put in front of the columns' names, see
            :func:`~odp_callbacks.engine.teachers.demonstration_contexts.demonstration_context`.

    Examples:
        >>> demonstration_columns(Demonstrations(("2",), ("3",), tries=4, successes=1), "student")["demonstrations"]
        ['2']
    """
    columns = {
        DEMONSTRATIONS: list(demonstrations.correct),
        WRONG_DEMONSTRATIONS: list(demonstrations.wrong),
        "demonstration_tries": demonstrations.tries,
        "demonstration_successes": demonstrations.successes,
        "demonstration_model": model_name,
    }
    return {source_column(name, source): value for name, value in columns.items()}


@dataclass(frozen=True)
class _Sampler:
    """Samples and verifies rounds of responses."""

    model: nn.Module
    tokenizer: Any
    verifier: Verifier
    options: DemonstrationOptions
    eos_token_ids: tuple[int, ...]
    randomness: Randomness
    engine: StudentEngine | None

    def sample(self, questions: Sequence[Question]) -> list[Demonstrations]:
        """Sample rounds for those questions whose demonstrations are incomplete, until the tries are used up."""
        by_question = [Demonstrations() for _ in questions]
        for round_number, size in enumerate(round_sizes(self.options.tries)):
            places = [place for place, one in enumerate(by_question) if not one.is_complete(self.options)]
            if not places:
                break
            rollouts = sample_rollouts(
                self.model,
                self.tokenizer,
                [questions[place] for place in places],
                per_question=size,
                max_new_tokens=self.options.max_new_tokens,
                temperature=self.options.temperature,
                eos_token_ids=self.eos_token_ids,
                # The draws of a round are named after it: they are no repetition of the rounds before.
                randomness=Randomness(self.randomness.key("demonstrations", round_number)),
                batch_size=self.options.batch_size,
                engine=self.engine,
            )
            for number, rollout in enumerate(score_rollouts(self.verifier, rollouts)):
                place = places[number // size]
                if not by_question[place].is_complete(self.options):
                    by_question[place] = by_question[place].with_try(rollout, self.options)
        return by_question


def round_sizes(tries: int) -> list[int]:
    """How many responses each round has: twice as many as the one before, ``tries`` in all.

    Examples:
        >>> round_sizes(60), round_sizes(6)
        ([4, 8, 16, 32], [4, 2])
    """
    sizes: list[int] = []
    while (left := tries - sum(sizes)) > 0:
        sizes.append(min(left, FIRST_ROUND * 2 ** len(sizes)))
    return sizes


def _encode(
    model: nn.Module, tokenizer: Any, rows: Any, reward: RewardFunction, options: DemonstrationOptions
) -> list[Question]:
    template = ChatTemplate(arguments=options.chat_template_kwargs)
    questions = as_questions(as_rows(rows), tokenizer, template=template)
    for question in questions:
        check_length(question.prompt_ids, options.max_new_tokens, model, f"question {question.id}")
    check_columns(reward, questions)
    return questions


def _key(store: DemonstrationStore | None, question: Question, options: DemonstrationOptions, seed: int) -> str:
    """What the demonstrations of a question are stored under."""
    if store is None:
        return ""
    row: Row = dict(question.row)
    return store.key("demonstrations", options.identity(), seed, question.id, row, question.prompt_ids.tolist())


def _from_entry(entry: dict[str, Any]) -> Demonstrations:
    values = {one.name: entry[one.name] for one in fields(Demonstrations)}
    return Demonstrations(**{**values, "correct": tuple(values["correct"]), "wrong": tuple(values["wrong"])})
