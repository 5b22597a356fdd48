"""A world small enough to enumerate: every response of a tiny student, and the truth about each node."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from odp_callbacks.functional import lora_gradients
from tests.helpers.models import LETTERS, tiny, word_tokenizer


@dataclass(frozen=True)
class ExactNode:
    """A node of the enumerable world: the truth about it."""

    prefix: tuple[int, ...]
    logits: Tensor
    success: Tensor
    reach: Tensor


@dataclass
class World:
    """A student whose every response can be enumerated: 5 tokens, of which 0 ends the response, and 3 steps."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    table: dict[str, float]
    prompt: str = "a b"
    horizon: int = 3
    size: int = 5

    @property
    def prompt_ids(self) -> Tensor:
        return torch.tensor(self.tokenizer(self.prompt)["input_ids"])

    @property
    def row(self) -> dict[str, Any]:
        return {"prompt": self.prompt}

    def ids(self, prefix: tuple[int, ...]) -> Tensor:
        return torch.cat([self.prompt_ids, torch.tensor(prefix, dtype=torch.long)])

    def reward(self, prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [self.table.get(text, 0.0) for text in completions]

    def text(self, response: tuple[int, ...]) -> str:
        return " ".join(LETTERS[k - 1] for k in response if k)

    def solve(self, temperature: float = 1.0) -> dict[tuple[int, ...], ExactNode]:
        """Every node, from the leaves up; the success of the root's tokens carries gradients if they are enabled."""
        levels = [list(product(range(1, self.size), repeat=d)) for d in range(self.horizon)]
        logits = {}
        for level in levels:
            rows = self.model(input_ids=torch.stack([self.ids(p) for p in level])).logits[:, -1]
            logits |= dict(zip(level, rows, strict=True))
        policy = {prefix: torch.softmax(z / temperature, dim=-1) for prefix, z in logits.items()}
        success: dict[tuple[int, ...], Tensor] = {}
        for prefix in [p for level in reversed(levels) for p in level]:
            success[prefix] = torch.stack(
                [
                    policy[child] @ success[child]
                    if (child := (*prefix, k)) in success
                    else torch.tensor(self.table[self.text(child)], dtype=torch.float64)
                    for k in range(self.size)
                ]
            )
        reach = {(): torch.ones((), dtype=torch.float64)}
        for prefix in [p for level in levels[1:] for p in level]:
            reach[prefix] = reach[prefix[:-1]] * policy[prefix[:-1]][prefix[-1]]
        return {p: ExactNode(p, z, success[p], reach[p]) for p, z in logits.items()}

    def responses(self, temperature: float = 1.0) -> dict[tuple[int, ...], float]:
        """Probability of every response."""
        found = {}
        with torch.no_grad():
            for prefix, node in self.solve(temperature).items():
                p = torch.softmax(node.logits / temperature, dim=-1)
                for k in range(self.size):
                    if k == 0 or len(prefix) == self.horizon - 1:
                        found[(*prefix, k)] = float(node.reach * p[k])
        return found

    def parameter_gradients(self, node: ExactNode, *directions: Tensor) -> Tensor:
        """The gradients on the LoRA parameters, ``(C, P)``, that directions on the node's logits correspond to."""
        ids = self.ids(node.prefix)
        return lora_gradients(self.model, ids, torch.tensor([len(ids) - 1]), torch.stack(directions)[None])[0]


def make_world(
    family: str = "llama",
    seed: int = 3,
    *,
    size: int = 5,
    horizon: int = 3,
    prompt: str = "a b",
    structured: bool = False,
    **changes: Any,
) -> World:
    """Rewards in [0, 1], drawn once for every response; structured ones are 0 or 1 and hang on every token."""
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2} if family == "gpt2" else {**small, "num_key_value_heads": 1}
    options = {"initializer_range": 0.25, **changes}
    model = tiny(
        family,
        vocabulary=size,
        seed=seed,
        eos_token_id=0,
        pad_token_id=None,
        bos_token_id=None,
        **sizes,
        **options,
    )
    words = ["</s>", *LETTERS[: size - 1]]
    world = World(model, word_tokenizer(words, bos=False, chat=False), {}, prompt, horizon, size)
    world.table = reward_table(world, seed, structured)
    return world


def reward_table(world: World, seed: int, structured: bool = False) -> dict[str, float]:
    """A reward for every response."""
    generator = torch.Generator().manual_seed(seed)
    responses = [r for d in range(world.horizon + 1) for r in product(range(1, world.size), repeat=d)]
    if structured:
        worth = torch.randn(world.horizon + 1, world.size, generator=generator)
        scores = [float(sum(worth[t, k] for t, k in enumerate((*r, 0)[: world.horizon + 1]))) for r in responses]
        return {world.text(r): float(score > 0) for r, score in zip(responses, scores)}
    drawn = torch.rand(len(responses), generator=generator).round(decimals=2)
    return {world.text(r): float(v) for r, v in zip(responses, drawn)}
