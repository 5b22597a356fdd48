"""The pages of troubleshooting know each warning that the library can say, and no other."""

import re
from functools import cache
from pathlib import Path

import pytest

import odp_callbacks
from tests.helpers.messages import VALUE, messages_of, python_files, sentences_in

PACKAGE = Path(odp_callbacks.__file__).parent
PAGES = [Path(__file__).parent.parent / "docs" / name for name in ("troubleshooting.md", "troubleshooting-setup.md")]
ALREADY_READ = ()
FORWARDED = {
    ("callbacks/failures.py", "consequence"): ALREADY_READ,
    ("callbacks/failures.py", "f'{consequence}: {type(error).__name__}: {error}'"): ALREADY_READ,
    ("callbacks/failures.py", "f'odp-callbacks: {message}'"): ALREADY_READ,
    ("callbacks/loss_weights.py", "f'odp-callbacks: {message}'"): ALREADY_READ,
    ("callbacks/transformers.py", "message"): ALREADY_READ,
    ("callbacks/trl_rollouts.py", "message"): ALREADY_READ,
    ("gates/trl_weighting.py", "failure"): ALREADY_READ,
    ("gates/trl_weighting.py", "message"): ALREADY_READ,
    ("callbacks/lightning.py", "complaint"): (("callbacks/headlines.py", "unknown"),),
    ("callbacks/missing_gains.py", "sentence"): (("analysis/ranking.py", "NO_GAIN"),),
    ("callbacks/monitor.py", "complaint"): (("callbacks/unprobed_run.py", "complaint"),),
    ("callbacks/monitor.py", "sentence"): (
        ("callbacks/saved_state.py", "restore_monitor"),
        ("callbacks/saved_state.py", "restore_parts"),
        ("callbacks/gate_learning.py", "_restore_state"),
        ("callbacks/gate_learning.py", "dropped_states"),
        ("engine/teachers/saved_states.py", "restore_teachers"),
    ),
    ("distillation.py", "f'odp-callbacks: {sentence}'"): (("engine/teachers/saved_states.py", "restore_teachers"),),
    ("engine/paper/probe.py", "usable.complaint"): (("engine/question_encoding.py", "complaint"),),
    ("engine/probe.py", "sentence"): (("analysis/time_shortage.py", "time_shortage"),),
    ("engine/probe.py", "usable.complaint"): (("engine/question_encoding.py", "complaint"),),
}
"""Where the text comes from that a call passes on: functions and constants by file, or none if it is a function of the
library that warns, whose calls are read themselves."""
NO_MESSAGES = {"callbacks/progress.py": "odp-callbacks: probe, {stage}"}
"""Lines that only tell how far a probe is, by file: how each of them begins."""
FEWEST_LETTERS_OF_A_PHRASE = 9


def forwarded() -> set[tuple[str, str]]:
    every = {(path, argument) for path, source in python_files(PACKAGE) for argument in messages_of(source).forwarded}
    return {(path, argument) for path, argument in every if NO_MESSAGES.get(path, VALUE) not in argument}


@cache
def all_messages() -> list[str]:
    direct = [text for _, source in python_files(PACKAGE) for text in messages_of(source).texts]
    producers = {producer for places in FORWARDED.values() for producer in places}
    passed_on = [text for path, name in producers for text in sentences_in((PACKAGE / path).read_text(), name)]
    return sorted({*direct, *passed_on})


def phrases(page: str) -> list[str]:
    """What is read according to the page: the code in the first column of its tables; `…` stands for anything."""
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    return [match[2].strip() for cell in cells for match in re.finditer(r"(`+)(.+?)\1(?!`)", cell) if match[2].strip()]


def knows(phrase: str, message: str) -> bool:
    return re.search(".*".join(re.escape(part.strip()) for part in phrase.split("…")), message, re.DOTALL) is not None


PHRASES = [phrase for page in PAGES for phrase in phrases(page.read_text())]


@pytest.mark.parametrize("message", all_messages(), ids=lambda message: message.replace(VALUE, "…")[:60])
def test_every_warning_of_the_source_is_explained(message: str) -> None:
    assert any(knows(phrase, message) for phrase in PHRASES), message.replace(VALUE, "…")


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_message_that_is_explained_exists(phrase: str) -> None:
    assert sum(character.isalpha() for character in phrase) >= FEWEST_LETTERS_OF_A_PHRASE, "too short to tell"
    assert any(knows(phrase, message) for message in all_messages())


def test_where_texts_that_are_passed_on_come_from_is_known() -> None:
    assert forwarded() == FORWARDED.keys()


def test_a_new_warning_would_be_noticed() -> None:
    source = '''
def measure(failures, context, count):
    """A docstring is no message."""
    failures.warn_once(context, f"measured {count} questions in vain")
    message = "the moon is " "full tonight"
    warnings.warn(message, stacklevel=2)
    failures.warn_once(context, explain(count))
'''
    found = messages_of(source)
    assert found.texts == [f"measured {VALUE} questions in vain", "the moon is full tonight"]
    assert found.forwarded == ["explain(count)"]
    assert not any(knows(phrase, text) for phrase in PHRASES for text in found.texts)
