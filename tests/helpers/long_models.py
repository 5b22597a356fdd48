"""Tiny models whose logits change beyond a length of 32 tokens, and the truth about them by full forward passes."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from odp_callbacks.functional.gradients import logits_at
from tests.helpers.models import BOS, EOS, PAD, randomise, tiny_base

ORIGINAL_LENGTH = 32
"""Tokens up to which the models compute as others do."""
OWN_WINDOW = 24
"""Positions that a model sees which builds a mask of its own."""
LONG_KINDS = ("long-rope", "dynamic", "own mask")


class OwnMaskLlama(LlamaForCausalLM):
    """A Llama that sees a window of positions, by a mask that it builds itself and a configuration does not show."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **options: Any) -> Any:
        cache = options.get("cache", options.get("past_key_values"))
        past = 0 if cache is None else cache.get_seq_length()
        rows = torch.arange(past, past + input_ids.shape[1])
        columns = torch.arange(past + input_ids.shape[1])
        visible = (columns <= rows[:, None]) & (columns > rows[:, None] - OWN_WINDOW)
        visible = visible.expand(len(input_ids), 1, *visible.shape)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            visible = visible & attention_mask[:, None, None].bool()
        mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill(~visible, torch.finfo(self.dtype).min)
        return super().forward(input_ids=input_ids, attention_mask=mask, **options)

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def long_student(kind: str) -> nn.Module:
    """A student with LoRA, of one of :data:`LONG_KINDS`."""
    targets = ["q_proj", "v_proj", "down_proj"]
    if kind == "long-rope":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.0],
            "long_factor": [40.0, 40.0],
            "original_max_position_embeddings": ORIGINAL_LENGTH,
            "factor": 4.0,
            "partial_rotary_factor": 1.0,
        }
        base = tiny_base(
            model_type="phi3",
            rope_parameters=rope,
            original_max_position_embeddings=ORIGINAL_LENGTH,
            max_position_embeddings=128,
            initializer_range=0.6,
        )
        targets = ["qkv_proj", "down_proj"]
    elif kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
        base = tiny_base(rope_parameters=rope, max_position_embeddings=ORIGINAL_LENGTH, initializer_range=0.6)
        base.config.max_position_embeddings = 128  # what it can be used for
        base.model.rotary_emb.config.max_position_embeddings = ORIGINAL_LENGTH
    else:
        config = LlamaConfig(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.6,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = OwnMaskLlama(config).double().eval()
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    return randomise(model, "default", 0.3, 0).double().eval()


def random_prompt(length: int) -> Tensor:
    """A prompt of words only."""
    return torch.randint(4, 12, (length,), generator=torch.Generator().manual_seed(length))


def fresh_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The logits ``(V,)`` after ``input_ids``, by a model that has seen nothing else."""
    with torch.no_grad():
        return logits_at(copy.deepcopy(model), input_ids[None], torch.tensor([len(input_ids) - 1]))[0, 0]


def fresh_greedy_tokens(
    model: nn.Module, prompt: Tensor, count: int, end_tokens: Sequence[int] = ()
) -> tuple[int, ...]:
    """The most probable continuation, by full forward passes."""
    input_ids, tokens = prompt, []
    while len(tokens) < count and not (tokens and tokens[-1] in end_tokens):
        tokens.append(int(fresh_logits(model, input_ids).argmax()))
        input_ids = torch.cat([input_ids, torch.tensor(tokens[-1:])])
    return tuple(tokens)
