"""Which backend is chosen for a model, and the warning about a slower one."""

import copy

import pytest

from odp_callbacks.engine.sampling.backend_selection import BACKENDS, SELECTION, backend_of
from tests.helpers.continuations import END_TOKENS, REQUESTS, greedy_tokens, prefill_sequences, sample
from tests.helpers.models import paddable


def test_every_test_family_shares_prefixes(family, recwarn):
    SELECTION.clear()
    assert backend_of(paddable(family)) == BACKENDS[0]
    assert not [warning for warning in recwarn if "continuations" in str(warning.message)]


@pytest.mark.parametrize(
    ("kind", "sizes", "backend"),
    [
        ("mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, "generate"),
        ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 4}, "repeated cache"),
    ],
)
def test_other_models_use_a_slower_backend_and_log_one_warning(kind, sizes, backend):
    """A recurrent model, and one with a position bias, still give the full forward's continuations."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    message = f"sampled by the backend '{backend}'.*same distribution.*shared prefix"
    with pytest.warns(UserWarning, match=message) as warned:
        assert [prefill_sequences(model, None).backend for _ in range(2)] == [backend] * 2
    assert len([warning for warning in warned if "same distribution" in str(warning.message)]) == 1
    requests = [request for request in REQUESTS if request.prefix_length > 0]
    assert backend_of(model) == backend
    prefixes = prefill_sequences(model, None)
    continuations = sample(model, prefixes, requests, temperature=1e-4, eos_token_ids=END_TOKENS)
    for request, continuation in zip(requests, continuations, strict=True):
        assert continuation.tokens == greedy_tokens(model, request, use_cache=False)


def test_a_window_that_attention_does_not_receive_is_detected(monkeypatch):
    """The trial is shorter than any real window, so a model that applies it only in its mask would pass it."""
    model = paddable("mistral", sliding_window=64)
    assert backend_of(model) == BACKENDS[0]
    SELECTION.clear()
    for layer in model.get_base_model().model.layers:
        config_without_window = copy.copy(layer.self_attn.config)
        config_without_window.sliding_window = None
        monkeypatch.setattr(layer.self_attn, "config", config_without_window)
    with pytest.warns(UserWarning, match="sliding window is not passed"):
        assert prefill_sequences(model, None).backend == "repeated cache"
