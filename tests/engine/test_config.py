from dataclasses import fields
from typing import get_type_hints

import pytest

from odp_callbacks.engine import ProbeConfig
from odp_callbacks.engine.config import ProbeOptions, resolve_config


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *((name, bad) for name in ("rollouts_per_question", "max_branches", "batch_size") for bad in (0, 1.0, True)),
        *((name, -1) for name in ("max_new_tokens", "continuations", "tail_draws", "budget")),
        ("budget", True),
        *((name, bad) for name in ("seconds", "half_width") for bad in (0.0, -1.0, float("nan"), float("inf"))),
        ("half_width", 0.1),
        ("target", "gain"),
        *(("temperature", bad) for bad in (0.0, -1.0, float("inf"), float("nan"))),
        *((name, bad) for name in ("branch_mass", "success_threshold") for bad in (0.0, 1.5, float("nan"))),
        *((name, bad) for name in ("teacher_branch_probability", "tail_roulette") for bad in (0.0, 1.0, -0.1)),
        *((name, bad) for name in ("differing_gradients", "agreeing_gradients") for bad in (0.0, 1.5)),
        ("nodes", "all"),
        ("divergence", "kl"),
        ("top_k", 0),
    ],
)
def test_settings_are_checked(field, bad):
    with pytest.raises(ValueError, match=f"`{field}`"):
        ProbeConfig(**{field: bad})


def test_options_of_another_divergence():
    with pytest.raises(ValueError, match="`beta` belongs to divergence 'jsd'"):
        ProbeConfig(beta=0.5)


def test_the_options_are_the_fields_of_the_configuration():
    assert get_type_hints(ProbeOptions) == get_type_hints(ProbeConfig)
    assert list(get_type_hints(ProbeOptions)) == [field.name for field in fields(ProbeConfig)]
    assert not ProbeOptions.__required_keys__


def test_options_replace_those_of_a_configuration():
    assert resolve_config(None, {}) == ProbeConfig()
    assert resolve_config(None, {"budget": 50}) == ProbeConfig(budget=50)
    config = ProbeConfig(budget=50, temperature=0.5)
    assert resolve_config(config, {}) == config
    assert resolve_config(config, {"budget": 60}) == ProbeConfig(budget=60, temperature=0.5)
    with pytest.raises(ValueError, match="`budget`"):
        resolve_config(config, {"budget": -1})


def test_an_unknown_option_is_answered_with_the_closest_and_with_all():
    with pytest.raises(TypeError, match=r"unknown option `temprature`; did you mean `temperature`\?") as error:
        resolve_config(None, {"temprature": 1.0})
    assert all(field.name in str(error.value) for field in fields(ProbeConfig))
    with pytest.raises(TypeError, match=r"unknown option `every_n_step`; did you mean `every_n_steps`\?.*temperature"):
        resolve_config(None, {"every_n_step": 1}, other_arguments=("every_n_steps", "prompts"))
    with pytest.raises(TypeError, match="unknown option `qqq`; Valid options are agreeing_gradients, batch_size, beta"):
        resolve_config(None, {"qqq": 1})


def test_a_configuration_of_another_type():
    with pytest.raises(TypeError, match=r"`config` must be a ProbeConfig, but \{'budget': 5\} was given"):
        resolve_config({"budget": 5}, {})
