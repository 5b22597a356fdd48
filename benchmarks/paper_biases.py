"""How much of "incorrect > correct" the paper's protocol makes itself, by two biases, at 20, 50 and 100 visits.

In the enumerated worlds success is known, and no teacher knows anything about it. Every row scores the same tokens:

- `truth`: with the true success. What it shows is made by the split alone: an incorrect path took the worse tokens.
- `paper`: with the success rates of the protocol.
- `own ending`: what the path's own ending among its visits adds, measured; and by enumeration of all outcomes.
- `ancestors`: what forced tokens add at the nodes before them.
- `predicted`: with the success rates that the protocol is predicted to converge to (analysis/paper/biases.py).

On SmolLM2-135M and one-digit sums the truth is not known; the two biases are taken away from the same tree.

Run: python benchmarks/paper_biases.py             (the worlds take 20 minutes)
     python benchmarks/paper_biases.py --parts student --record /tmp/sums.npz    (an hour; the record is kept)
"""

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from example_tasks import example_task
from paper_worlds import TinyQuestion, measure, predicted_rates, tiny_question, true_rates
from sizes import parse_sizes
from student import end_of_line, student_and_tokenizer

from odp_callbacks.analysis.paper.aggregates import class_difference, class_difference_change
from odp_callbacks.analysis.paper.bias_variants import PAPER, UNBIASED, bias_variants
from odp_callbacks.analysis.paper.biases import expected_cosine
from odp_callbacks.analysis.paper.node_score import renormalised
from odp_callbacks.analysis.paper.records import PaperRecord
from odp_callbacks.analysis.paper.scored_nodes import ScoredNodes
from odp_callbacks.engine.journal import Journal
from odp_callbacks.engine.paper import PaperConfig, PaperProbe
from odp_callbacks.storage.paper_records import load_paper_record, save_paper_record

USUAL = {
    "parts": ["worlds"],
    "worlds": 400,
    "visits": [20, 50, 100],
    "questions": 8,
    "rollouts": 200,
    "contexts": 4,
    "record": "",
}
SMOKE = {
    "parts": ["worlds", "student"],
    "worlds": 6,
    "visits": [6],
    "questions": 1,
    "rollouts": 4,
    "contexts": 1,
    "record": "",
}
OWN_LEFT_OUT = ("left out", "counted")
OWN_POLICY = ("counted", "own policy only")


def gap(nodes: ScoredNodes) -> str:
    """Incorrect minus correct in the mean cosine, with its interval over questions."""
    estimate = class_difference(nodes).difference
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def added(nodes: ScoredNodes, without: ScoredNodes) -> str:
    """What a bias adds to the gap, with the interval of the differences of questions."""
    estimate = class_difference_change(nodes, without)
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def of_teacher(nodes: ScoredNodes, teacher: int) -> ScoredNodes:
    """The nodes with the figures of one teacher."""
    chosen = slice(teacher, teacher + 1)
    return replace(
        nodes,
        teachers=nodes.teachers[chosen],
        cosine=nodes.cosine[:, chosen],
        advantage=nodes.advantage[:, chosen],
        predictors={name: values[:, chosen] for name, values in nodes.predictors.items()},
    )


def enumerated_own_ending(questions: list[TinyQuestion], record: PaperRecord, nodes: ScoredNodes) -> ScoredNodes:
    """The nodes with what the own ending adds to each score, by enumeration of all numbers of successes."""
    effect = np.full_like(nodes.cosine, np.nan)
    places = [(index, place) for index, one in enumerate(record.questions) for place in range(len(one.paths))]
    true_success = true_rates(questions, record)
    for row, (path_number, depth) in enumerate(zip(nodes.path.tolist(), nodes.depth.tolist(), strict=True)):
        index, place = places[path_number]
        question = record.questions[index]
        path, children = question.paths[place], question.tree.children(place, *UNBIASED)
        chosen = np.flatnonzero((children.depth == depth) & (children.visits >= record.settings["minimum_visits"]))
        recorded = [
            np.flatnonzero((path.depth == depth) & (path.token == token))[0] for token in children.token[chosen]
        ]
        taken = int(np.flatnonzero(children.token[chosen] == question.tree.paths[place][depth])[0])
        success = true_success(index, place, children)[chosen]
        visits = children.visits[chosen].astype(int)
        with_own = visits + (np.arange(len(visits)) == taken)
        policy = np.exp(renormalised(path.student[recorded]))
        for teacher in range(len(nodes.teachers)):
            log_ratio = path.student[recorded] - path.teachers[teacher, recorded]
            without, _ = expected_cosine(policy, log_ratio, success, visits)
            biased, _ = expected_cosine(policy, log_ratio, success, with_own, taken, path.correct)
            effect[row, teacher] = biased - without
    return replace(nodes, cosine=effect)


def print_worlds(sizes: dict[str, Any]) -> None:
    """Print the table of the enumerated worlds."""
    questions = [tiny_question(seed) for seed in range(sizes["worlds"])]
    for visits in sizes["visits"]:
        start = time.perf_counter()
        config = PaperConfig(
            rollouts_per_question=2 * visits, enriched_visits=visits, minimum_visits=visits - 1, by_gradient=4
        )
        record = measure(questions, config, seed=visits)
        truths = {"truth": true_rates(questions, record), "predicted": predicted_rates(questions, record)}
        variants = bias_variants(record, others=truths)
        enumerated = enumerated_own_ending(questions, record, variants[UNBIASED])
        print(f"\n{visits} visits, {len(questions)} enumerated worlds, {len(enumerated)} nodes", flush=True)
        for teacher, name in enumerate(record.teachers):
            nodes = {variant: of_teacher(scored, teacher) for variant, scored in variants.items()}
            rows = {
                "truth": gap(nodes["truth"]),
                "paper": gap(nodes[PAPER]),
                "predicted": gap(nodes["predicted"]),
                "without both": gap(nodes[UNBIASED]),
                "own ending adds": added(nodes[OWN_POLICY], nodes[UNBIASED]),
                "own ending, enumerated": gap(of_teacher(enumerated, teacher)),
                "own ending, beside forced visits": added(nodes[PAPER], nodes[OWN_LEFT_OUT]),
                "ancestors add": added(nodes[OWN_LEFT_OUT], nodes[UNBIASED]),
            }
            for row, text in rows.items():
                print(f"  {name:12} {row:33} {text}", flush=True)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def student_record(sizes: dict[str, Any]) -> PaperRecord:
    """The record of the real student: measured, or read from the file that keeps it."""
    path = Path(sizes["record"]) if sizes["record"] else None
    if path is not None and path.exists():
        return load_paper_record(path)
    task = example_task("chain_sum", sizes["questions"], seed=0, contexts=sizes["contexts"])
    student, tokenizer = student_and_tokenizer()
    config = PaperConfig(
        rollouts_per_question=sizes["rollouts"],
        enriched_visits=max(sizes["visits"]),
        max_new_tokens=task.measure["max_new_tokens"],
        eos_token_ids=end_of_line(tokenizer),
    )
    probe = PaperProbe(student, tokenizer, task.reward, task.contexts, config)
    journal = None if path is None else Journal(path.with_suffix(".journal"))
    record = probe.run(task.rows, progress=_show, journal=journal)
    if path is not None and journal is not None:
        save_paper_record(record, path)
        journal.remove()
    return record


def _show(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"  {stage}: {total}", flush=True)


def print_student(sizes: dict[str, Any]) -> None:
    """Print the table of the real student, from the same tree at each number of visits."""
    record = student_record(sizes)
    cost = {name: f"{count:,}" for name, count in record.generated_tokens.items()}
    print(
        f"\nSmolLM2-135M, sums: {len(record.questions)} questions, {record.targeted_rollouts:,} targeted rollouts, "
        f"tokens {cost}, left out {dict(record.left_out)}; {'; '.join(record.deviations)}"
    )
    largest = record.settings["enriched_visits"]
    for visits in sizes["visits"]:
        thinned = replace(
            record,
            questions=tuple(replace(one, tree=one.tree.thinned(visits / largest)) for one in record.questions),
        )
        # Thinned branches have about this many visits, some fewer.
        nodes = bias_variants(thinned, minimum_visits=max(2, round(0.75 * visits)))
        print(
            f"  {visits} visits: {len(nodes[PAPER])} nodes, {_lowered(thinned, nodes[PAPER]):.0%} of the taken tokens"
        )
        rows = {
            "paper": gap(nodes[PAPER]),
            "without both": gap(nodes[UNBIASED]),
            "both add": added(nodes[PAPER], nodes[UNBIASED]),
            "own ending adds": added(nodes[OWN_POLICY], nodes[UNBIASED]),
            "own ending, beside forced visits": added(nodes[PAPER], nodes[OWN_LEFT_OUT]),
            "ancestors add": added(nodes[OWN_LEFT_OUT], nodes[UNBIASED]),
        }
        for row, text in rows.items():
            print(f"    {row:33} {text}", flush=True)


def _lowered(record: PaperRecord, nodes: ScoredNodes) -> float:
    """Share of scored tokens and teachers where the teacher gives the taken token less than the student does."""
    places = [(question, place) for question in record.questions for place in range(len(question.paths))]
    lower = []
    for path_number, depth in zip(nodes.path.tolist(), nodes.depth.tolist(), strict=True):
        question, place = places[path_number]
        path = question.paths[place]
        taken = (path.depth == depth) & (path.token == question.tree.paths[place][depth])
        lower.append(path.teachers[:, taken][:, 0] < path.student[taken][0])
    return float(np.mean(lower)) if lower else float("nan")


def main() -> None:
    """Run the benchmark."""
    warnings.filterwarnings("ignore")
    sizes = parse_sizes(__doc__, USUAL, SMOKE)
    if "worlds" in sizes["parts"]:
        print_worlds(sizes)
    if "student" in sizes["parts"]:
        print_student(sizes)


if __name__ == "__main__":
    main()
