"""Tiny models, a tiny tokenizer, and a world small enough to enumerate."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from odp_callbacks.functional import lora_gradients, lora_parameters
from odp_callbacks.records import Floats, NodeRecord, ProbeReport, RolloutRecord
from odp_callbacks.summaries import PREDICTORS

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tests")

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

    def pull(self, node: ExactNode, *directions: Tensor) -> Tensor:
        """Directions on the node's logits on the LoRA parameters, ``(C, P)``."""
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


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def student() -> nn.Module:
    return tiny()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataclass
class Vectors:
    """Explicit gradients behind a record: ``(A - 1, P)`` and ``(K, P)`` on the parameters, ``V`` on the logits."""

    record: NodeRecord
    arms: Floats
    teachers: Floats
    logit_arms: Floats
    logit_teachers: Floats
    sizes: tuple[int, ...]


def synthetic(
    success: Sequence[float],
    *,
    count: Sequence[int] | int = 4,
    weight: Sequence[float] | None = None,
    tail: Sequence[bool] | None = None,
    exact: Sequence[bool] | bool = False,
    teachers: int = 2,
    seed: int = 0,
    **fields: Any,
) -> Vectors:
    """A record of a node with given successes and drawn gradients, in two modules of 5 and 7 parameters."""
    rng, arms = np.random.default_rng(seed), len(success)
    weight = np.full(arms, 1 / arms) if weight is None else np.array(weight)
    tail = np.zeros(arms, bool) if tail is None else np.array(tail)
    counts, q = np.broadcast_to(count, arms).astype(np.int64), np.array(success)
    u, d = rng.normal(size=(arms - 1, 12)), rng.normal(size=(teachers, 12))
    logit_u, logit_d = rng.normal(size=(arms - 1, 9)), rng.normal(size=(teachers, 9))
    rows, logit_rows = np.concatenate([u, d]), np.concatenate([logit_u, logit_d])
    shares = rng.dirichlet(np.ones(arms + 1), size=teachers)
    record = NodeRecord(
        **{
            "rollout": 0,
            "question": "0",
            "depth": 0,
            "inclusion": 1.0,
            "correct": True,
            "tokens": np.arange(arms),
            "probability": weight,
            "weight": weight,
            "tail": tail,
            "taken": 0,
            "count": counts,
            "total": q * counts,
            "total_square": q * q * counts,
            "exact": np.broadcast_to(exact, arms),
            "gram": np.stack([rows[:, :5] @ rows[:, :5].T, rows[:, 5:] @ rows[:, 5:].T]),
            "logit_gram": logit_rows @ logit_rows.T,
            "teacher_probability": shares[:, :-1],
            "teacher_tail": 1 - shares[:, :-1][:, ~tail].sum(1),
            "predictors": {name: rng.random(teachers) for name in PREDICTORS},
            **fields,
        }
    )
    return Vectors(record, u, d, logit_u, logit_d, (5, 7))


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


MakeReport = Callable[..., ProbeReport]


def node_with_gain(gains: tuple[float, ...], success: tuple[float, float] = (0.25, 0.75), **fields: Any) -> NodeRecord:
    """Two branches whose difference in success, 0.5 by default, points along one direction; teachers lie in a plane.

    The ideal gradient is ``weight (Q_1 - Q_0) u`` with ``|u| = 1``, so a teacher at the cosine ``c`` to ``u`` has the
    predicted gain ``weight (Q_1 - Q_0) c``; ``gains`` are those cosines.
    """
    record = synthetic(success, count=4, weight=(0.5, 0.5), teachers=len(gains), **fields).record
    vectors = np.array([(1.0, 0.0), *((c, (1 - c * c) ** 0.5) for c in gains)])
    gram = vectors @ vectors.T
    return NodeRecord(**{**record.__dict__, "gram": gram[None], "logit_gram": gram})


def report_maker() -> MakeReport:
    """What the fixture ``make_report`` gives, for fixtures of a wider scope."""

    def make(
        gains: Callable[[bool, int], tuple[float, ...]],
        *,
        questions: int = 6,
        depths: tuple[int, ...] = (0, 2, 5),
        noise: float = 0.05,
        seed: int = 0,
        teachers: tuple[str, ...] = ("near", "far"),
        first: int = 0,
        **fields: Any,
    ) -> ProbeReport:
        """A correct and an incorrect rollout of each question; ``gains(correct, depth)`` are cosines by teacher.

        No depths in a row: neighbours would tell each other what they know of success.
        """
        rng = np.random.default_rng(seed)
        rollouts, nodes = [], []
        for q in range(first, first + questions):
            for correct in (True, False):
                rollouts.append(RolloutRecord(str(q), "p", ("t",) * 8, "t", float(correct), correct, False))
                for depth in depths:
                    cosines = tuple(np.clip(np.array(gains(correct, depth)) + noise * rng.normal(), -1, 1))
                    nodes.append(
                        node_with_gain(
                            cosines,
                            rollout=len(rollouts) - 1,
                            question=str(q),
                            correct=correct,
                            depth=depth,
                            inclusion=1 / max(depth, 1),
                            **fields,
                        )
                    )
        spent = {"rollouts": 10, "continuations": 10}
        return ProbeReport(teachers, ("m",), tuple(rollouts), tuple(nodes), spent, 4, 0, {"rollouts": 1.0})

    return make


def in_modules(report: ProbeReport, layers: int = 2) -> ProbeReport:
    """The same gradients, split over modules of several layers."""
    modules = tuple(f"model.layers.{i}.self_attn.{m}_proj" for i in range(layers) for m in "qv")
    share = np.arange(1.0, len(modules) + 1)
    grams = [np.stack([s * n.gram[0] for s in share / share.sum()]) for n in report.nodes]
    nodes = tuple(replace(n, gram=gram) for n, gram in zip(report.nodes, grams, strict=True))
    return replace(report, nodes=nodes, modules=modules)


def many_teachers(count: int, **fields: Any) -> ProbeReport:
    """A probe of so many teachers, each helping more than the one before."""
    names = tuple(f"teacher {k}" for k in range(count))
    return report_maker()(lambda correct, depth: tuple(0.1 * k - 0.3 for k in range(count)), teachers=names, **fields)


@pytest.fixture
def make_report() -> MakeReport:
    return report_maker()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from selenium import webdriver

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary, "install Debian's package chromium"
    assert driver, "install Debian's package chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1400"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


HOSTILE = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\x00\x1b[31mred\x07", "\u202eright to left",
    "x" * 100_000, "\ud800", "Ġâ\x80", "{{ 7 * 7 }}", "$\\frac{1}{0}$", "&amp;\u2028<!--", "",
]  # fmt: skip


def split(correct: bool, depth: int) -> tuple[float, ...]:
    return (0.6, -0.4 if correct else 0.1)


def hostile(make_report: MakeReport) -> ProbeReport:
    report = make_report(split, questions=len(HOSTILE))
    rollouts = tuple(
        replace(r, question=HOSTILE[i // 2], prompt=HOSTILE[i // 2], pieces=tuple(HOSTILE), text=HOSTILE[i // 2])
        for i, r in enumerate(report.rollouts)
    )
    nodes = tuple(replace(n, question=rollouts[n.rollout].question) for n in report.nodes)
    words = dict(enumerate(HOSTILE))
    return replace(report, rollouts=rollouts, nodes=nodes, teachers=(HOSTILE[0], HOSTILE[3]), token_text=words)
