"""The run on a real student that serves as the truth: many continuations of every branch.

Writes ``benchmarks/results/heavy``, which ``efficiency.py`` reads. About half an hour on two cores.

Run: python benchmarks/heavy.py --continuations 128
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import seed_everything
from recording import recording_trees
from sizes import size_parser
from student import end_of_line, student_and_tokenizer

from odp_callbacks.cli.tasks import make_task
from odp_callbacks.engine import Probe, ProbeConfig, Teacher
from odp_callbacks.engine.tree.continuation_tree import ContinuationTree
from odp_callbacks.storage import save

OUTPUT = Path(__file__).parent / "results" / "heavy"
USUAL = {"continuations": 128, "questions": 6, "seed": 1}
SMOKE = {"continuations": 1, "questions": 1}
TEACHERS = {"answer": Teacher("The answer is {answer}.\n{prompt}"), "solution": Teacher("{solution}\n{prompt}")}


def mean_lengths(tree: ContinuationTree) -> list[float]:
    """The mean length of the continuations at each node."""
    lengths = [tokens / max(1, count) for tokens, count in tree.sampled_lengths]
    return [lengths[group_index] for group_index in tree.group_of_node]


def main(continuations: int, questions: int, seed: int, output: Path) -> None:
    """Run and save."""
    seed_everything(seed, verbose=False)
    student, tokenizer = student_and_tokenizer(lora_alpha=16)
    task = make_task("chain_sum", questions=questions, lines=8, shots=2, seed=seed)
    config = ProbeConfig(
        rollouts_per_question=2,
        max_new_tokens=20,
        continuations=continuations,
        eos_token_ids=end_of_line(tokenizer),
        batch_size=256,
        step_alignment=False,
        differing_gradients=1.0,  # the truth about every node
        agreeing_gradients=1.0,
    )
    probe = Probe(student, tokenizer, task.reward, TEACHERS, config)
    with recording_trees() as trees:
        report = probe.run(task.rows, seed=seed, progress=lambda *stage: print(*stage, flush=True))
    report = replace(report, settings={**report.settings, "lengths": json.dumps(mean_lengths(trees[0]))})
    save(report, output, overwrite=True)
    print(len(report.nodes), report.generated_tokens, report.stage_seconds)


if __name__ == "__main__":
    parser = size_parser(__doc__, USUAL, SMOKE)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    sizes = vars(parser.parse_args())
    if sizes.pop("smoke"):
        with tempfile.TemporaryDirectory() as folder:
            main(**{**sizes, "output": Path(folder) / "heavy"})
    else:
        main(**sizes)
