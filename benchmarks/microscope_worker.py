"""Measures nodes as a process of its own: `microscope.py` starts one with the library as it is and one as it was.

It reads jobs as lines of JSON and answers each with a line of JSON. It uses only what both versions have.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.cli.datasets import load_questions
from odp_callbacks.cli.diagnosis import run_diagnosis
from odp_callbacks.cli.models import load_student
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.records import ProbeReport

EXAMPLES = Path(__file__).parent.parent / "examples" / "diagnose"
FIGURES = ("predicted_gain", "gain_weighted_alignment", "alignment")


class World:
    """A student with its questions, its teachers and how to measure it.

    Args:
        name: A file of examples/diagnose, or ``"random"``: a small random model, whose responses all reach the limit.
        questions: Number of questions.
    """

    def __init__(self, name: str, questions: int) -> None:
        model, self.tokenizer = load_student(None, lambda _: None)
        if name == "random":
            torch.manual_seed(0)
            shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(self.tokenizer), max_position_embeddings=2048, **shape))
            self.rows: list[dict[str, Any]] = [{"prompt": f"Question {number}:"} for number in range(questions)]
            self.reward, self.contexts = letters_reward, {"hint": "A hint: {prompt}", "another": "Another: {prompt}"}
            self.options: dict[str, Any] = {"max_new_tokens": 512, "max_branches": 3, "tail_draws": 1}
        else:
            settings = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text("utf-8"))
            self.rows, task_reward = load_questions(
                settings["dataset"], count=questions, seed=0, settings=settings.get("settings")
            )
            assert task_reward is not None
            self.reward, self.contexts = task_reward, settings["teachers"]
            stops = tuple(self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
            self.options = {"max_new_tokens": 24, "max_branches": 3, "tail_draws": 1, "eos_token_ids": stops}
        torch.manual_seed(0)
        self.student = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, task_type="CAUSAL_LM")).eval()

    def config(self, job: dict[str, Any]) -> ProbeConfig:
        """The configuration of a job: nodes alone."""
        return ProbeConfig(**self.options, update=False, step_alignment=False, **job["options"])

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Measure, and say what it took and how narrow the intervals are."""
        start = time.process_time()
        if job["way"] == "diagnose":
            with tempfile.TemporaryDirectory() as folder:
                report = run_diagnosis(
                    self.student,
                    self.tokenizer,
                    self.rows,
                    self.reward,
                    self.contexts,
                    Path(folder),
                    config=self.config(job),
                    seed=job["seed"],
                )
        else:
            probe = Probe(self.student, self.tokenizer, self.reward, self.contexts, self.config(job))
            report = probe.run(probe.validate(self.rows), seed=job["seed"])
        return {"seconds": time.process_time() - start, **figures(report)}


def letters_reward(completions: list[str], **_: Any) -> list[float]:
    """Reward 1 for an even number of letters: every token can decide, and none does for sure."""
    return [float(sum(map(str.isalpha, completion)) % 2 == 0) for completion in completions]


def figures(report: ProbeReport) -> dict[str, Any]:
    """What is compared."""
    analysis = Analysis(report)
    summaries = [summary for summary in analysis.summaries() if summary.split == "all"]
    widths = np.array([[summary.figures[figure].half_width for figure in FIGURES] for summary in summaries], float)
    weights = np.array([1 / node.inclusion for node in report.nodes])
    return {
        "stages": report.stage_seconds,
        "nodes": len(weights),
        "kish": float(weights.sum() ** 2 / len(weights) / (weights**2).sum()) if len(weights) else None,
        "half_widths": dict(zip(FIGURES, _mean_of_known(widths).tolist(), strict=True)) if len(weights) else {},
        "decided": int(
            np.sum(
                [
                    abs(summary.figures["predicted_gain"].value) > summary.figures["predicted_gain"].half_width
                    for summary in summaries
                ]
            )
        ),
        "significant_tokens": int(np.sum(analysis.significant_tokens())) if len(weights) else 0,
        "continuations": report.continuations,
        "tokens": report.generated_tokens,
        "occupancy": getattr(report, "slot_occupancy", None),
    }


def _mean_of_known(widths: np.ndarray) -> np.ndarray:
    """Mean over the teachers that have an interval; NaN where none has one."""
    known = np.isfinite(widths)
    with np.errstate(invalid="ignore"):
        return np.where(known, widths, 0).sum(axis=0) / known.sum(axis=0)


def main() -> None:
    """Answer jobs until the input ends."""
    worlds: dict[tuple[str, int], World] = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        key = job["world"], job["questions"]
        if key not in worlds:
            worlds.clear()
            worlds[key] = World(*key)
        print(json.dumps(worlds[key].run(job)), file=answers, flush=True)


main()
