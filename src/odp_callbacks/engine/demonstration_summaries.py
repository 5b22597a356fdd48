"""Summaries of correct responses, written by a model."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from odp_callbacks.engine.answers import END_OF_THINKING
from odp_callbacks.engine.chat_template import ChatTemplate
from odp_callbacks.engine.demonstration_store import DemonstrationStore
from odp_callbacks.engine.demonstrations import DemonstrationOptions
from odp_callbacks.engine.prompts import Question, Row, as_questions, check_length
from odp_callbacks.engine.rollouts import Rollout, end_tokens, sample_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teachers.context import prompt_in_context
from odp_callbacks.engine.teachers.demonstration_contexts import DEMONSTRATIONS
from odp_callbacks.engine.timing import Progress
from odp_callbacks.engine.training_state import preserving_training_state

SUMMARY_TEMPLATE = f'''{{prompt}}

What follows is a correct response to the question above.
"""
{{{DEMONSTRATIONS}[0]}}
"""

Summarise in a few sentences how it arrives at its answer, and state the answer. Do not write anything else.'''
"""Asks for a summary; the wording is ours."""
SUMMARY_TRIES = 4
"""Summaries of a response that are sampled; the first that is complete and not empty is taken."""


def summarise_demonstrations(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    options: DemonstrationOptions | None = None,
    *,
    template: str = SUMMARY_TEMPLATE,
    seed: int = 0,
    store: DemonstrationStore | None = None,
    progress: Progress | None = None,
) -> list[str | None]:
    """Let a model summarise the first correct response to each question.

    Args:
        model: The student, or another causal language model.
        tokenizer: Its tokenizer.
        rows: Rows with the column ``demonstrations``.
        options: Temperature, length, batch size and engine; the other options are not read. None for the defaults.
        template: What the model is asked, in place of the row's prompt or of its last user message. A model with a chat
            template is asked in a message.
        seed: Seed of all random draws.
        store: Keeps the summaries that are done.
        progress: Called with the stage's name, the number of rows done, and their number.

    Returns:
        A summary of each row's first demonstration; None where there is no demonstration or no try gave a summary. What
        a summary says is not verified.

    Raises:
        EngineError: If the engine does not sample from the model.
        ValueError: If a row lacks the column, or is too long.
    """
    options = options or DemonstrationOptions()
    report = progress or (lambda stage, done, total: None)
    summaries: list[str | None] = [None] * len(rows)
    questions = _encode(model, tokenizer, rows, options, template)
    keys = {
        place: "" if store is None else store.key("summary", options.identity(), seed, question.prompt_ids.tolist())
        for place, question in questions.items()
    }
    stored = {} if store is None else store.entries
    for place, key in keys.items():
        if key in stored:
            summaries[place] = stored[key]["summary"]
    missing = [place for place, key in keys.items() if key not in stored]
    report("summaries", len(questions) - len(missing), len(questions))
    block_size = max(1, options.batch_size // SUMMARY_TRIES)
    eos_token_ids, randomness = end_tokens(model, tokenizer), Randomness(Randomness(seed).key("summaries"))
    with (
        preserving_training_state(model),
        options.prepared_engine(model, [questions[place] for place in missing], eos_token_ids, randomness) as engine,
    ):
        for first in range(0, len(missing), block_size):
            places = missing[first : first + block_size]
            rollouts = sample_rollouts(
                model,
                tokenizer,
                [questions[place] for place in places],
                per_question=SUMMARY_TRIES,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                eos_token_ids=eos_token_ids,
                randomness=randomness,
                batch_size=options.batch_size,
                engine=engine,
            )
            for place, summary in zip(places, _summaries(rollouts), strict=True):
                summaries[place] = summary
                if store is not None:
                    store.write(keys[place], {"summary": summary})
            report("summaries", len(questions) - len(missing) + first + len(places), len(questions))
    return summaries


def _encode(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], options: DemonstrationOptions, template: str
) -> dict[int, Question]:
    """The prompts that ask for summaries, by the place of the row; none for a row without demonstration."""
    questions: dict[int, Question] = {}
    for place, row in enumerate(rows):
        if DEMONSTRATIONS not in row:
            raise ValueError(f"`rows` need the column {DEMONSTRATIONS!r}, but row {place} has only {sorted(row)}.")
        if not row[DEMONSTRATIONS]:
            continue
        prompt = prompt_in_context(template, row)
        if isinstance(prompt, str) and getattr(tokenizer, "chat_template", None):
            # It is an instruction, also where the question is a text to be continued.
            prompt = [{"role": "user", "content": prompt}]
        asked = {**row, "prompt": prompt, "id": str(row.get("id", place))}
        (question,) = as_questions([asked], tokenizer, template=ChatTemplate(arguments=options.chat_template_kwargs))
        check_length(question.prompt_ids, options.max_new_tokens, model, f"the summary of question {question.id}")
        questions[place] = question
    return questions


def _summaries(rollouts: Sequence[Rollout]) -> list[str | None]:
    """The first complete summary of each; only the text after a thinking part."""
    summaries: list[str | None] = []
    for first in range(0, len(rollouts), SUMMARY_TRIES):
        tries = rollouts[first : first + SUMMARY_TRIES]
        texts = [one.text.rpartition(END_OF_THINKING)[2].strip() for one in tries if not one.truncated]
        summaries.append(next((text for text in texts if text), None))
    return summaries
