"""Models that do not return logits over their vocabulary are refused."""

import copy
from typing import Any

import pytest
from torch import nn

from odp_callbacks.engine import ModelTeacher, Probe
from odp_callbacks.engine.sampling.vocabulary import check_logit_widths
from tests.helpers.models import tiny, tiny_base, word_tokenizer
from tests.helpers.probes import ROWS, word_reward

MESSAGE = r"over its vocabulary of 12 tokens, but `logits` has a width of 16; a model that returns hidden states"


def returning_hidden_states(model: nn.Module) -> nn.Module:
    """The model, whose forward returns its hidden states as logits, as unsloth's may."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.lm_head

    class NoHead(nn.Module):
        weight = head.weight
        in_features, out_features = 16, 12

        def forward(self, hidden: Any) -> Any:
            return hidden

    inner.lm_head = NoHead()
    return model


def test_a_student_that_returns_hidden_states_is_refused_before_training_and_in_a_probe() -> None:
    probe = Probe(returning_hidden_states(tiny()), word_tokenizer(), word_reward, "base", max_new_tokens=4)
    with pytest.raises(ValueError, match=MESSAGE):
        probe.validate(ROWS)
    with pytest.raises(ValueError, match=MESSAGE):
        probe.run(ROWS)


def test_a_teacher_that_returns_hidden_states_is_refused() -> None:
    teacher = returning_hidden_states(tiny_base(seed=3))
    probe = Probe(tiny(), word_tokenizer(), word_reward, ModelTeacher(teacher), max_new_tokens=4)
    with pytest.raises(ValueError, match=MESSAGE):
        probe.validate(ROWS)
    with pytest.raises(ValueError, match=MESSAGE):
        probe.run(ROWS)


def test_padding_rows_are_logits_and_a_model_that_cannot_run_yet_is_not_judged() -> None:
    check_logit_widths([tiny(vocabulary=16), copy.deepcopy(tiny()).to("meta")])
