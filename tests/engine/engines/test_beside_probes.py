"""What is sampled beside a probe goes through the engine, too, and comes out as from the model itself."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from odp_callbacks.engine import BaseTeacher, EMATeacher, ModelTeacher, Probe, Teacher
from odp_callbacks.engine.demonstration_summaries import summarise_demonstrations
from odp_callbacks.engine.demonstrations import DemonstrationOptions, sample_demonstrations
from odp_callbacks.engine.engines import EngineError, VllmInProcess
from odp_callbacks.engine.engines.choice import engine_of_other_policies
from odp_callbacks.engine.engines.student_engine import engine_of_run
from odp_callbacks.engine.engines.trl_trainer import ColocatedEngine, TrainerServerEngine
from odp_callbacks.engine.paper import PaperProbe
from odp_callbacks.engine.teacher_responses import sample_teacher_responses
from odp_callbacks.engine.trial_step import success_by_question, trial_step
from odp_callbacks.functional import lora_parameters
from tests.helpers.engines import OwnSampler
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.paper import measure_world, paper_teachers, paper_world
from tests.helpers.probes import word_reward

ROWS = [{"prompt": prompt, "answer": answer} for prompt, answer in (("a b", "c"), ("c", "d"), ("b a d", "e"))]


OPTIONS = DemonstrationOptions(tries=8, max_new_tokens=6)


def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(not {"a", "c"}.isdisjoint(completion.split())) for completion in completions]


@contextmanager
def checking_release(engine: OwnSampler, syncs: int) -> Iterator[None]:
    yield
    assert len(engine.synced) == engine.released == syncs
    assert len(engine.calls) > syncs, "each sync is checked by one call, and then sampled from"


def test_demonstrations_and_summaries() -> None:
    engine = OwnSampler()
    with checking_release(engine, syncs=1):
        through = sample_demonstrations(tiny(), word_tokenizer(), ROWS, reward, replace(OPTIONS, engine=engine))
    assert through == sample_demonstrations(tiny(), word_tokenizer(), ROWS, reward, OPTIONS)
    assert any(one.correct for one in through)
    rows = [{**row, "demonstrations": ["a b"]} for row in ROWS]
    with checking_release(engine := OwnSampler(), syncs=1):
        summaries = summarise_demonstrations(tiny(), word_tokenizer(), rows, replace(OPTIONS, engine=engine))
    assert summaries == summarise_demonstrations(tiny(), word_tokenizer(), rows, OPTIONS)


def test_the_papers_protocol() -> None:
    engine, options = OwnSampler(), {"rollouts_per_question": 8, "enriched_visits": 6}
    with checking_release(engine, syncs=1):
        through = measure_world(paper_world(), paper_teachers(1), engine=engine, **options)
    own = measure_world(paper_world(), paper_teachers(1), **options)
    assert through.generated_tokens == own.generated_tokens
    assert through.targeted_rollouts == own.targeted_rollouts > 0
    assert through.settings["engine"] == "own sampler"
    for question, expected in zip(through.questions, own.questions, strict=True):
        assert [path.text for path in question.paths] == [path.text for path in expected.paths]
        for name in ("shared", "next_token", "success", "branch", "count"):
            np.testing.assert_array_equal(getattr(question.tree, name), getattr(expected.tree, name))


def test_responses_of_teachers_on_the_students_base() -> None:
    student, average = tiny(), EMATeacher()
    average.update(student, 0)
    with torch.no_grad():
        for parameter in lora_parameters(student).values():
            parameter.add_(0.5)  # the average is now another policy
    teachers = {"hint": Teacher("{answer} {prompt}"), "base": BaseTeacher(), "ema": average}
    teachers["other"] = ModelTeacher(tiny_base(seed=7))
    options = {"max_new_tokens": 5, "budget": 0}
    engine = OwnSampler()
    probe = Probe(student, word_tokenizer(), word_reward, teachers, engine=engine, **options)
    with checking_release(engine, syncs=3):  # the engine has not the weights of another model
        through = sample_teacher_responses(probe, ROWS, responses=3)
    own = Probe(student, word_tokenizer(), word_reward, teachers, **options)
    assert through == sample_teacher_responses(own, ROWS, responses=3)
    name = next(name for name in engine.synced[0] if "lora_B" in name)
    assert torch.equal(engine.synced[0][name], student.state_dict()[name])
    assert not torch.equal(engine.synced[2][name], student.state_dict()[name]), "the average was sent"


def test_a_step_on_trial_sends_the_adapter_anew() -> None:
    student, engine = tiny(), OwnSampler()
    probe = Probe(student, word_tokenizer(), word_reward, "base", engine=engine, max_new_tokens=5)
    own = Probe(student, word_tokenizer(), word_reward, "base", max_new_tokens=5)
    size = sum(parameter.numel() for parameter in lora_parameters(student).values())
    direction = torch.randn(size, generator=torch.Generator().manual_seed(1))
    for context in (lambda: trial_step(student, direction, 3.0), lambda: trial_step(student, direction, 1e-9)):
        with context():
            found, expected = (success_by_question(one, one.encode(ROWS), 4, seed=0) for one in (probe, own))
        np.testing.assert_array_equal(found, expected)
    name = next(name for name in engine.synced[0] if "lora_B" in name)
    assert not torch.equal(engine.synced[0][name], engine.synced[1][name])
    assert engine.released == 2


def test_a_trainers_server_samples_only_from_the_trainings_policy() -> None:
    engine = object.__new__(TrainerServerEngine)  # its weights could not be put back
    assert engine_of_other_policies(engine) is None
    assert engine_of_other_policies(own := OwnSampler()) is own


def start_demonstrations(engine: OwnSampler) -> None:
    sample_demonstrations(tiny(), word_tokenizer(), ROWS, reward, replace(OPTIONS, engine=engine))


def start_paper(engine: OwnSampler) -> None:
    PaperProbe(tiny(), word_tokenizer(), word_reward, "base", engine=engine, max_new_tokens=4).run(ROWS)


@pytest.mark.parametrize("start", [start_demonstrations, start_paper])
def test_an_engine_with_another_policy_is_refused(start: Callable[[OwnSampler], None]) -> None:
    class Stale(OwnSampler):
        def sync(self, student: torch.nn.Module, step: int) -> None:
            other = copy.deepcopy(student)
            for parameter in other.parameters():
                parameter.data.mul_(1.5)
            super().sync(other, step)

    engine = Stale()
    with pytest.raises(EngineError, match="does not sample from the student"):
        start(engine)
    assert engine.released == 1


def test_the_engine_of_a_trainer_must_be_given_as_the_trainer() -> None:
    with pytest.raises(ValueError, match="the trainer itself can be given"):
        DemonstrationOptions(engine="trainer")


@pytest.mark.parametrize("is_colocated", [True, False])
def test_an_engine_on_the_same_device_finds_its_memory(is_colocated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, released = OwnSampler(), list[int]()
    engine.is_colocated = is_colocated  # type: ignore[attr-defined]  # as the engines of vLLM in this process have it
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(engine.released))
    with pytest.raises(KeyError), engine_of_run(engine, tiny(), 0):
        raise KeyError
    assert released == [1] * is_colocated, "once, after it has given back what it took"
    assert VllmInProcess.is_colocated
    assert ColocatedEngine.is_colocated
