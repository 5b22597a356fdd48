"""Whether a probe ends in the seconds that it is given, and what it has measured by then.

Run: python benchmarks/deadline.py

The student has the shape of SmolLM2-135M and random weights, so that nearly every response would reach the limit of
4,096 tokens. A probe in each mode gets the same seconds. One that ends early says whether all was done, or the next
unit of work would not have ended in time.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sizes import parse_sizes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from odp_callbacks.analysis.time_shortage import time_shortage
from odp_callbacks.cli.diagnosis import run_diagnosis
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.records import ProbeReport

USUAL = {"seconds": 20.0, "questions": 6, "rollouts": 2, "tokens": 4096, "given": 16, "layers": 30, "repeats": 1}
SMOKE = {"seconds": 4.0, "questions": 4, "rollouts": 2, "tokens": 128, "given": 16, "layers": 1, "repeats": 1}
VOCABULARY = 49_152
TEACHERS = {"hint": "w17 w4 w9 {prompt}"}


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are ``w0``, ``w1`` and so on."""
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0", unk_token="w1")


def random_student(layers: int) -> Any:
    """A student of SmolLM2-135M's shape, with random weights and LoRA."""
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=8192, num_hidden_layers=layers, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=2, **shape,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    student = get_peft_model(LlamaForCausalLM(config), lora).eval()
    return student.to("cuda" if torch.cuda.is_available() else "cpu")


def parity_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 where the numbers of the words add up to an even number: as good as a coin, for any text."""
    return [float(sum(int(word[1:]) for word in text.split()) % 2 == 0) for text in completions]


class Bench:
    """A student, its questions, and a probe in each mode."""

    def __init__(self, questions: int, rollouts: int, tokens: int, given: int, layers: int, seconds: float) -> None:
        self.student, self.tokenizer, self.seconds = random_student(layers), words_tokenizer(), seconds
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(3, VOCABULARY, (questions, 6), generator=generator).tolist()
        self.rows = [{"prompt": " ".join(f"w{word}" for word in row)} for row in words]
        self.options: dict[str, Any] = {"max_new_tokens": tokens, "rollouts_per_question": rollouts}
        shape = (questions, rollouts, given)
        self.responses = torch.randint(3, VOCABULARY, shape, generator=generator).tolist()
        self.long_response = (self.responses[0][0] * tokens)[:tokens]

    def run(self, run_seconds: float | None = None, responses: Any = None, **options: Any) -> ProbeReport:
        """A probe, as the first one that this student sees."""
        probe = Probe(self.student, self.tokenizer, parity_reward, TEACHERS, ProbeConfig(**self.options), **options)
        return probe.run(self.rows, responses=responses, seconds=run_seconds)

    def modes(self) -> dict[str, Callable[[], ProbeReport]]:
        """What is measured, by the name of the mode."""
        return {
            "budget=0": lambda: self.run(seconds=self.seconds, budget=0),
            "given responses": lambda: self.run(seconds=self.seconds, budget=0, responses=self.responses),
            "given responses of all tokens": lambda: self.run(
                seconds=self.seconds, budget=0, responses=[[self.long_response] * 2] * len(self.rows)
            ),
            "nodes, seconds alone": lambda: self.run(seconds=self.seconds),
            "nodes, update=False": lambda: self.run(seconds=self.seconds, update=False),
            "nodes, budget": lambda: self.run(seconds=self.seconds, budget=2000),
            "nodes, continuations=2": lambda: self.run(self.seconds, continuations=2),
            "nodes='every'": lambda: self.run(seconds=self.seconds, nodes="every"),
            "diagnose": self.diagnose,
        }

    def diagnose(self) -> ProbeReport:
        """The command's measurement, in a folder of its own."""
        with tempfile.TemporaryDirectory() as folder:
            config = ProbeConfig(**self.options, seconds=self.seconds, step_alignment=False)
            return run_diagnosis(
                self.student, self.tokenizer, self.rows, parity_reward, TEACHERS, Path(folder), config=config
            )


def figures(report: ProbeReport) -> str:
    """What a report holds, in words."""
    found = [f"responses of {max((len(one.pieces) for one in report.rollouts), default=0)} tokens"]
    if report.updates:
        gram = report.updates[0].gram
        gain = next(one for one in report.summary() if one.split == "all").figures["update_gain"]
        found.append(f"gain {gain.value:+.3f} of {int(gram.questions.sum())} questions")
        found += ["influence"] if report.updates[0].influence is not None else []
    if report.nodes:
        gain = next(one for one in report.summary() if one.split == "all").figures["predicted_gain"]
        found.append(f"predicted gain {gain.value:+.3f} of {len(report.nodes)} nodes")
        found.append(f"{report.continuations} continuations")
    return ", ".join(found)


def main() -> None:
    """Print a table of modes, seconds and figures."""
    sizes = parse_sizes(__doc__, USUAL, SMOKE)
    repeats, seconds = sizes.pop("repeats"), sizes["seconds"]
    bench = Bench(**sizes)
    print(f"{seconds:g} seconds, responses of up to {sizes['tokens']} tokens, {torch.get_num_threads()} threads\n")
    print("| mode | seconds | in time | figures | left out | stages |\n|---|---|---|---|---|---|")
    for mode, run in bench.modes().items():
        for _ in range(repeats):
            start = time.perf_counter()
            report = run()
            taken = time.perf_counter() - start
            early = "early: no other unit fitted" if time_shortage(report) else "early: all was done"
            verdict = early if taken < 0.9 * seconds else "yes" if taken <= 1.1 * seconds else "NO"
            left_out = {name: count for name, count in report.left_out.items() if count}
            stages = {name: round(value, 1) for name, value in report.stage_seconds.items()}
            print(f"| {mode} | {taken:.1f} | {verdict} | {figures(report)} | {left_out} | {stages} |", flush=True)


if __name__ == "__main__":
    main()
