"""Demonstrations: sampled, verified, stored, and summarised."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from odp_callbacks.engine import demonstration_summaries
from odp_callbacks.engine.demonstration_store import DemonstrationStore
from odp_callbacks.engine.demonstration_summaries import summarise_demonstrations
from odp_callbacks.engine.demonstrations import (
    DemonstrationOptions,
    Demonstrations,
    demonstration_columns,
    round_sizes,
    sample_demonstrations,
)
from odp_callbacks.engine.prompts import Question, encode_prompt
from odp_callbacks.engine.rollouts import Rollout
from tests.helpers.models import Snapshot, tiny, word_tokenizer

ROWS = [{"prompt": prompt, "answer": "a"} for prompt in ("a b", "c", "b a d", "d c", "e")]
OPTIONS = DemonstrationOptions(correct=2, wrong=1, tries=20, max_new_tokens=8, batch_size=8)
QUESTION = Question("0", {}, torch.tensor([1]))


def is_right(text: str) -> bool:
    return not {"a", "c"}.isdisjoint(text.split())


class AReward:
    """Gives 1 to responses with an "a" or a "c", and counts those that it is given."""

    def __init__(self) -> None:
        self.responses = 0

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        self.responses += len(completions)
        return [float(is_right(completion)) for completion in completions]


def sample(rows: Any = ROWS, **options: Any) -> list[Demonstrations]:
    kept = {name: options.pop(name) for name in ("seed", "store", "progress") if name in options}
    reward = options.pop("reward", AReward())
    return sample_demonstrations(tiny(), word_tokenizer(), rows, reward, replace(OPTIONS, **options), **kept)


@pytest.fixture(scope="module")
def found() -> list[Demonstrations]:
    return sample()


def response(text: str, reward: float, truncated: bool = False) -> Rollout:
    return Rollout(QUESTION, (5,), text, truncated, reward)


def test_responses_are_taken_in_their_order_until_there_are_enough() -> None:
    tries = [
        response("cut", 1, truncated=True),  # a success, but no demonstration
        response("right", 1),
        response("right", 1),  # the same again
        response("unscored", float("nan")),
        response("also right", 1),
        response("a third", 1),  # not needed
        response(" ", 0),  # nothing
        response("half", 0.5),
        response("wrong", 0),
    ]
    found = Demonstrations()
    for one in tries:
        if not found.is_complete(OPTIONS):
            found = found.with_try(one, OPTIONS)
    assert found == Demonstrations(("right", "also right"), ("half",), tries=8, successes=5)
    assert found.is_complete(OPTIONS)


def test_rounds_double_up_to_the_number_of_tries() -> None:
    assert round_sizes(60) == [4, 8, 16, 32]
    assert all(sum(round_sizes(tries)) == tries for tries in range(1, 100))


def test_demonstrations_are_verified_and_different(found: list[Demonstrations]) -> None:
    assert any(one.is_complete(OPTIONS) for one in found)
    for one in found:
        assert all(is_right(text) for text in one.correct)
        assert not any(is_right(text) for text in one.wrong)
        assert len(set(one.correct)) == len(one.correct) <= 2
        assert one.tries == 20 or one.is_complete(OPTIONS)
        assert one.successes >= len(one.correct)


def test_a_question_does_not_depend_on_the_others_or_the_batch(found: list[Demonstrations]) -> None:
    assert sample(batch_size=3) == found
    assert sample([{**ROWS[3], "id": "3"}]) == found[3:4]
    assert sample(seed=1) != found


def test_tries_end(found: list[Demonstrations]) -> None:
    reward = AReward()
    none = sample(ROWS[:1], reward=lambda prompts, completions, **columns: [0.0] * len(completions))
    assert (none[0].correct, none[0].tries, none[0].successes) == ((), 20, 0)
    sample(ROWS[:1], reward=reward)
    assert reward.responses <= 20


def test_the_model_and_the_random_streams_are_left_alone() -> None:
    student, state = tiny(dropout=0.5).train(), torch.get_rng_state()
    snapshot = Snapshot(student)
    sample_demonstrations(student, word_tokenizer(), ROWS[:2], AReward(), OPTIONS)
    snapshot.check()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_stored_is_not_sampled_again(found: list[Demonstrations], tmp_path: Path) -> None:
    store, reward = DemonstrationStore(tmp_path / "store"), AReward()

    def interrupt(stage: str, done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(store=store, reward=reward, progress=interrupt)
    seen = reward.responses
    with store.path.open("ab") as file:
        file.write(b'00000000 ["cut sh')
    assert sample(store=DemonstrationStore(store.path), reward=reward) == found
    assert 0 < reward.responses - seen <= 20, "only the last question was left"
    seen = reward.responses
    assert sample(store=DemonstrationStore(store.path), reward=reward, batch_size=2) == found
    assert reward.responses == seen
    for change in ({"seed": 1}, {"temperature": 0.8}, {"rows": [{**ROWS[0], "answer": "b"}]}):
        sample(**{"rows": ROWS[:1], "store": DemonstrationStore(store.path), "reward": reward, **change})
        assert reward.responses > seen, f"another {change}"
        seen = reward.responses
    sample(ROWS[:1], store=DemonstrationStore(store.path, {"model": "another"}), reward=reward)
    assert reward.responses > seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tries": 0}, "`tries` must be a positive integer"),
        ({"correct": 0, "wrong": 0}, "at least one of them positive"),
        ({"success_threshold": 0.0}, r"`success_threshold` must lie in \(0, 1\]"),
        ({"temperature": 0.0}, "`temperature` must be a positive number"),
        ({"max_new_tokens": 100}, "question 0 has 3 tokens and `max_new_tokens` is 100"),
    ],
)
def test_what_does_not_work_is_said_before_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(**options)
    with pytest.raises(ValueError, match="needs the argument 'solution'"):
        sample(reward=lambda prompts, completions, solution: [])


def test_summaries_are_of_the_first_demonstration_and_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "demonstrations": ["c d", "e"]}, {"prompt": "c", "demonstrations": []}]
    asked: list[list[int]] = []
    original = demonstration_summaries.sample_rollouts

    def sample_rollouts(model: Any, tokenizer: Any, questions: Any, **options: Any) -> Any:
        asked.extend(question.prompt_ids.tolist() for question in questions)
        return original(model, tokenizer, questions, **options)

    monkeypatch.setattr(demonstration_summaries, "sample_rollouts", sample_rollouts)
    arguments = (tiny(), word_tokenizer(chat=False), rows, replace(OPTIONS, max_new_tokens=8))
    template = "{prompt} f {demonstrations[0]}"
    store = DemonstrationStore(tmp_path / "store")
    summaries = summarise_demonstrations(*arguments, template=template, store=store)
    assert asked == [word_tokenizer()("a b f c d")["input_ids"]]
    assert summaries[1] is None
    assert summaries[0] is None or summaries[0].strip()
    again = summarise_demonstrations(*arguments, template=template, store=DemonstrationStore(store.path))
    assert (again, len(asked)) == (summaries, 1)
    summarise_demonstrations(tiny(), word_tokenizer(), rows, arguments[-1], template=template)
    message = [{"role": "user", "content": "a b f c d"}]
    assert asked[1] == encode_prompt(word_tokenizer(), message).tolist(), "a model with a chat template is asked in one"
    with pytest.raises(ValueError, match="need the column 'demonstrations', but row 0 has only"):
        summarise_demonstrations(tiny(), word_tokenizer(), ROWS)


def test_columns_of_several_models_have_different_names(found: list[Demonstrations]) -> None:
    own, big = demonstration_columns(found[0], "student"), demonstration_columns(found[0], "big", "32B")
    assert own.keys().isdisjoint(big)
    assert big["32B_demonstrations"] == own["demonstrations"] == list(found[0].correct)
