"""The options of the callbacks."""

from dataclasses import fields
from typing import Any

import pytest

from odp_callbacks import ProbeConfig
from odp_callbacks.callbacks.schedule import CallbackOptions, ProbeSchedule, ScheduleOptions, resolve_options
from tests.helpers.training import make_callback


def test_the_keyword_arguments_are_the_fields_of_schedule_and_config() -> None:
    schedule_names = {field.name for field in fields(ProbeSchedule)}
    config_names = {field.name for field in fields(ProbeConfig)}
    assert set(ScheduleOptions.__annotations__) == schedule_names
    assert CallbackOptions.__optional_keys__ == schedule_names | config_names
    assert not schedule_names & config_names


def test_options_are_sorted_into_schedule_and_config() -> None:
    schedule, config = resolve_options(ProbeConfig(max_new_tokens=9), {"every_n_steps": 5, "continuations": 3})
    assert schedule == ProbeSchedule(every_n_steps=5)
    assert config == ProbeConfig(max_new_tokens=9, continuations=3)


@pytest.mark.parametrize(
    ("misspelt", "closest"),
    [("every_n_step", "every_n_steps"), ("max_tokens", "max_new_tokens"), ("tokeniser", "tokenizer")],
)
def test_a_misspelt_argument_is_answered_with_the_closest_and_all_valid_ones(misspelt: str, closest: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option `{misspelt}`; did you mean `{closest}`") as raised:
        make_callback(**{misspelt: 1})
    for name in (*CallbackOptions.__optional_keys__, "student", "tokenizer", "gate", "config"):
        assert name in str(raised.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every_n_steps": True}, "`every_n_steps` must be a positive integer, but True was given"),
        ({"update_every_n_steps": 0}, "`update_every_n_steps` must be a positive integer, but 0 was given"),
        ({"step_gain_every_n_steps": -1}, "`step_gain_every_n_steps` must be a positive integer, but -1 was given"),
        ({"questions_per_probe": 2.0}, r"`questions_per_probe` must be a positive integer, but 2\.0 was given"),
        ({"max_overhead": 1.0}, r"`max_overhead` must lie in \(0, 1\) or be None"),
        ({"confidence": 0.0}, r"`confidence` must lie in \(0, 1\)"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ProbeSchedule(**options)


def test_a_multiple_that_is_jumped_over_counts() -> None:
    schedule = ProbeSchedule(every_n_steps=3, update_every_n_steps=2)
    assert [step for step in (2, 4, 6, 8) if schedule.probe_is_due(step, step - 2)] == [4, 6]
    assert schedule.update_is_due(4, 3)
    assert not ProbeSchedule().update_is_due(4, 3)
    assert ProbeSchedule().step_gain_is_due(4, 3)
    assert not ProbeSchedule(step_gain_every_n_steps=3).step_gain_is_due(5, 3)
    assert not ProbeSchedule(step_gain_every_n_steps=None).step_gain_is_due(4, 3)
