"""Sizes of layers are read from the layers, whatever the configuration calls them."""

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from odp_callbacks.engine.gradients.graph_memory import max_directions
from odp_callbacks.engine.gradients.layer_sizes import layer_sizes
from tests.helpers.models import tiny, tiny_base

GEMMA_3N = {
    "hidden_size": 16,
    "intermediate_size": [24, 40],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size_per_layer_input": 12,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "layer_types": ["full_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
    "altup_num_inputs": 2,
}
PHI_3 = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT_NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("gemma3n_text", GEMMA_3N, (16, 40, 4)),  # a list of widths
        ("phi3", PHI_3, (16, 48, 4)),  # two projections in one layer
        ("gpt_neo", GPT_NEO, (16, 64, 4)),  # no width at all
        ("mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, (32, 64, 1)),  # no heads
    ],
)
def test_sizes_are_those_of_the_layers(kind: str, sizes: dict[str, Any], expected: tuple[int, int, int]) -> None:
    config = AutoConfig.for_model(kind, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert layer_sizes(model) == expected
    assert max_directions(model, 10, 10, 1e9) > 1


def test_adapters_and_the_head_do_not_count(family: str) -> None:
    model = tiny(family, vocabulary=1000)
    assert layer_sizes(model) == (16, 64 if family == "gpt2" else 24, 4)
    options = {"fan_in_fan_out": True} if family == "gpt2" else {}
    base = tiny_base(family, vocabulary=1000)
    wide = get_peft_model(base, LoraConfig(r=200, target_modules="all-linear", **options))
    assert layer_sizes(wide) == layer_sizes(model)
