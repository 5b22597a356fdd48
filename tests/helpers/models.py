"""Tiny models, a tiny tokenizer, and what is asked of them in tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from odp_callbacks.functional import lora_parameters

HALF = (torch.bfloat16, torch.float16)


DTYPES = (torch.float64, torch.float32, *HALF)


DIVERGENCES: list[tuple[str, dict[str, Any]]] = [
    ("reverse_kl", {}),
    ("forward_kl", {}),
    ("jsd", {}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 0.3}),
    ("jsd", {"beta": 1.0}),
    ("sampled_token", {}),
]


_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


_LLAMA_LIKE = {**_SIZES, "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.4}


# Windows of 4 tokens: every test's sequences are longer.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA_LIKE},
    "qwen3": {"model_type": "qwen3", **_LLAMA_LIKE},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.4},
    "gemma2": {"model_type": "gemma2", **_LLAMA_LIKE, "sliding_window": 4},
    "mistral": {"model_type": "mistral", **_LLAMA_LIKE, "sliding_window": 4},
}


LETTERS = "abcdefg"


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "a", "b", "c", "d", "e", "f"]


PAD, BOS, EOS, UNK = range(4)


def tiny_base(family: str = "llama", *, vocabulary: int = len(WORDS), seed: int = 0, **changes: Any) -> nn.Module:
    """A seeded model in float64 and evaluation mode."""
    from transformers import AutoConfig

    values = {"max_position_embeddings": 64, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(**{**FAMILIES[family], **values, "vocab_size": vocabulary, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).double().eval()


def tiny(
    family: str = "llama", *, seed: int = 0, dropout: float = 0.0, scale: float = 0.3, **changes: Any
) -> nn.Module:
    """The same with LoRA; ``scale`` is that of the B matrices, which peft starts at zero."""
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(
        tiny_base(family, seed=seed, **changes),
        LoraConfig(r=2, lora_alpha=4, target_modules=targets, lora_dropout=dropout),
    )
    return randomise(model, "default", scale, seed).double().eval()


def paddable(family: str, **changes: Any) -> nn.Module:
    """A model that stands padding beyond its window; Gemma's softmax is in float32, where a float64 mask is -inf."""
    model = tiny(family, **changes)
    return model.float() if family == "gemma2" else model


def randomise(model: nn.Module, adapter: str, scale: float, seed: int) -> nn.Module:
    """Draw an adapter's A matrices, and its B matrices at ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(noise * (scale if "lora_B" in name else 0.4))
    return model


def word_tokenizer(words: list[str] | None = None, *, bos: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """A WordLevel tokenizer: one id for each word, a BOS in front of strings."""
    words = words or WORDS
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>" if bos else None))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"eos_token": "</s>"}
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.index("<s>"))])
        special |= {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if chat:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% if not loop.last or "
            "m.role != 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %} assistant{% endif %}"
        )
    return tokenizer


@dataclass
class Snapshot:
    """Everything of a model that a measurement must not change."""

    model: nn.Module
    before: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._take()

    def _take(self) -> list[Any]:
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        return [
            [m.training for m in self.model.modules()],
            [(p.requires_grad, p.grad is None, p._version, p.data_ptr()) for p in self.model.parameters()],
            [p.detach().clone().tolist() for p in self.model.parameters()],
            [(tuple(m.active_adapters), m.disable_adapters) for m in layers],
            getattr(self.model, "active_adapter", None),
        ]

    def check(self) -> None:
        # As a list of truths: pytest would take minutes to show where long lists differ.
        assert [a == b for a, b in zip(self.before, self._take(), strict=True)] == [True] * len(self.before)


def flat_parameters(model: nn.Module) -> Tensor:
    """The LoRA parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in lora_parameters(model).values()])


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest expected number."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def count_tokens(model: nn.Module, seen: list[tuple[int, int]]) -> Callable[[], None]:
    """Append the shape of every forward's ``input_ids`` to ``seen``; returns what ends it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = inner.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return hook.remove
