"""Which models sample with few operator calls, and that what they sample from is their own policy."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from odp_callbacks.engine.sampling.backends import prefill_rollouts
from odp_callbacks.engine.sampling.decoder.choice import choose_decoder, compare_steps
from odp_callbacks.engine.sampling.decoder.projections import CalledLayers
from tests.helpers.continuations import PROMPTS, prefill_sequences
from tests.helpers.models import Snapshot, paddable, randomise, tiny, tiny_base

PLENTY = 2**30


def choice_of(model, usable_bytes=PLENTY):
    return choose_decoder(model, prefill_sequences(model).cache, 30, usable_bytes)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_models_like_llama_are_served_in_every_precision_and_stay_as_they_are(family, dtype):
    model = paddable(family).to(dtype)
    snapshot = Snapshot(model)
    choice = choice_of(model)
    assert choice.reason == ""
    assert choice.parts.dtype == dtype
    is_merged = all(layer.down.lora_down is None for layer in choice.parts.layers)
    assert is_merged == (dtype != torch.bfloat16), "rounded to half precision, merged LoRA would be lost"
    snapshot.check()


def test_under_autocast_the_layers_compute_in_half_precision():
    model = tiny().float()
    with torch.autocast("cpu", torch.bfloat16):
        choice = choice_of(model)
    assert choice.reason == ""
    assert choice.parts.dtype == torch.bfloat16


def test_little_memory_leaves_lora_beside_the_weights_and_less_leaves_the_model_alone():
    model = tiny().float()
    merged_bytes = choice_of(model).copied_bytes
    beside = choice_of(model, int(1.5 * merged_bytes))
    assert beside.parts.layers[0].down.lora_down is not None
    assert beside.copied_bytes < merged_bytes
    assert "GiB" in choice_of(model, beside.copied_bytes).reason


@pytest.mark.parametrize(("family", "reason"), [("gpt2", "GPT2Model has"), ("gemma2", "feedforward_layernorm")])
def test_other_families_run_their_own_forward_pass(family, reason):
    assert reason in choice_of(paddable(family)).reason


def test_a_model_that_someone_listens_to_runs_its_own_forward_pass():
    model = tiny()
    seen = []
    model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    prefixes = prefill_sequences(model).cache
    seen.clear()
    assert choose_decoder(model, prefixes, 30, PLENTY).reason == "LlamaMLP has hooks"
    assert seen == []


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"use_rslora": True}])
def test_adapters_of_other_kinds_are_called_as_they_are(options):
    config = LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "down_proj"], **options)
    model = randomise(get_peft_model(tiny_base(), config).double().eval(), "default", 0.3, 0)
    choice = choice_of(model)
    assert choice.reason == ""
    called = {isinstance(layer.down, CalledLayers) for layer in choice.parts.layers}
    assert called == {"use_dora" in options}


def test_the_adapters_that_are_active_are_the_ones_that_sample():
    model = tiny()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    randomise(model.double().eval(), "other", 0.5, 1)
    weights = []
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        choice = choice_of(model)
        assert choice.reason == ""
        weights.append(choice.parts.layers[0].gate_up.weights[0])
    assert not torch.equal(*weights)
    with model.disable_adapter():
        assert choice_of(model).reason == ""


class ScaledByPosition(nn.Module):
    """A rotary embedding that scales at late positions, as some long models do."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, states, position_ids):
        cosines, sines = self.rotary(states, position_ids)
        scale = 1 + 0.5 * (position_ids > 25)[..., None]
        return cosines * scale, sines * scale


def test_what_only_a_comparison_shows_is_found_at_the_last_position():
    """Some families scale queries by their positions: nothing but the logits shows it, and only far from the start."""
    model = tiny()
    cache = prefill_sequences(model).cache
    parts = choose_decoder(model, cache, 30, PLENTY).parts
    model.get_base_model().model.rotary_emb = ScaledByPosition(model.get_base_model().model.rotary_emb)
    compare_steps(model, parts, cache, 20)
    with pytest.raises(ArithmeticError, match="logits differ"):
        compare_steps(model, parts, cache, 30)


def test_prompts_without_responses_are_served():
    model = tiny()
    with torch.no_grad():
        cache = prefill_rollouts(model, PROMPTS, backend="shared prefix").cache
        assert choose_decoder(model, cache, 30, PLENTY).reason == ""
        empty = prefill_rollouts(model, PROMPTS[1:2], backend="shared prefix").cache
        assert choose_decoder(model, empty, 30, PLENTY).reason == "there is no prefix"
