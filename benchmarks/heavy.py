"""The heavy run that stands for the truth on a real student: many continuations of every branch.

    python benchmarks/heavy.py --continuations 128

Writes ``benchmarks/results/heavy``, which ``efficiency.py`` reads. About half an hour on two cores.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from peft import LoraConfig, get_peft_model

from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task
from odp_callbacks.engine import Probe, ProbeConfig, Teacher
from odp_callbacks.storage import save


class Counting(Probe):
    """Keeps the lengths of the continuations."""

    def _continue(self, rollouts: Any, tree: Any, *more: Any) -> Any:
        found = super()._continue(rollouts, tree, *more)
        self.lengths = [tree.length[g][0] / max(1, tree.length[g][1]) for g in tree.group]
        return found


def main() -> None:
    """Run and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--continuations", type=int, default=128)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "heavy")
    options = parser.parse_args()
    seed_everything(options.seed, verbose=False)
    model, tokenizer = load_student(None, print)
    task = make_task("chain_sum", questions=options.questions, lines=8, shots=2, seed=options.seed)
    student: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")).eval()
    teachers = {"answer": Teacher("The answer is {answer}.\n{prompt}"), "solution": Teacher("{solution}\n{prompt}")}
    config = ProbeConfig(
        rollouts_per_question=2,
        max_new_tokens=20,
        continuations=options.continuations,
        eos_token_ids=tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]),
        batch_size=256,
        step_alignment=False,
    )
    probe = Counting(student, tokenizer, task.reward, teachers, config)
    report = probe.run(task.rows, seed=options.seed, progress=lambda *step: print(*step, flush=True))
    report = replace(report, settings={**report.settings, "lengths": json.dumps(probe.lengths)})
    save(report, options.output, overwrite=True)
    print(len(report.nodes), report.generated_tokens, report.seconds)


if __name__ == "__main__":
    main()
