"""Trials compute in float32 whatever the precision of the model, and see what half precision hides."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from odp_callbacks.engine.sampling.backend_selection import BACKENDS, SELECTION, backend_of
from odp_callbacks.engine.sampling.exact_arithmetic import computes_exactly, exact_arithmetic
from tests.helpers.models import Snapshot, tiny

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def from_config(kind: str, dtype: torch.dtype, **sizes: object) -> nn.Module:
    """A model with the small weights that its own initialisation gives."""
    config = AutoConfig.for_model(kind, vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("xglm", {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4}),
        ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
        (
            "gpt_neo",
            {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        ),
    ],
)
def test_attention_that_is_not_transformers_own_is_seen_in_every_precision(
    kind: str, sizes: dict[str, object], dtype: torch.dtype
) -> None:
    """These models ignore the shared prefix; with small weights, that moves their logits by a hundredth only."""
    assert backend_of(from_config(kind, dtype, **sizes)) != BACKENDS[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_ignores_one_token_in_five_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from odp_callbacks.engine.sampling import attention

    exact = attention.attend

    def forgetful(query, key, value, *arguments, **options):  # type: ignore[no-untyped-def]
        if key.shape[2] >= 5:
            key = torch.cat([key[:, :, :4], key[:, :, :1], key[:, :, 5:]], dim=2)
        return exact(query, key, value, *arguments, **options)

    monkeypatch.setattr(attention, "attend", forgetful)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert backend_of(from_config("llama", dtype, **sizes)) == "repeated cache"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_share_prefixes_and_stay_as_they_are(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    before = Snapshot(model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with exact_arithmetic(model):
        assert computes_exactly(model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not computes_exactly(model)
    assert backend_of(model) == BACKENDS[0]
    before.check()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor is parameters.get(name, buffers.get(name))


def test_autocast_is_off_in_the_exact_trial_and_on_in_another() -> None:
    model = tiny().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not computes_exactly(model)
        with exact_arithmetic(model):
            assert computes_exactly(model)
        assert SELECTION.verdict(model, 1, 40).backend == BACKENDS[0]
