"""Nodes of SmolLM2 on sums for ``long_responses.py``, with what an answer that is forced there would be worth.

Branches succeed as often as in the 128 continuations of ``results/heavy``, from which outcomes are drawn again. At
every branch ``". Answer:"`` is appended and the probability of the right answer is read off, in one forward pass.
Responses are short; their lengths are scaled to those that ``long_responses.py`` asks for.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from long_response_worlds import Floats, NodeDraws
from student import student_and_tokenizer

from odp_callbacks.cli.tasks import make_task
from odp_callbacks.records import NodeRecord, RolloutRecord
from odp_callbacks.storage import load

HEAVY = Path(__file__).parent / "results" / "heavy"
TEACHER = "solution"
MARK = "Answer:"


def student(draws: int, rng: np.random.Generator) -> NodeDraws:
    """Each node of the record some times, with new outcomes.

    Args:
        draws: Of each node.
        rng: Random stream.
    """
    report = load(HEAVY)
    settings, lengths = report.settings, json.loads(report.settings["lengths"])
    questions = sorted({node.question for node in report.nodes})
    task = make_task("chain_sum", questions=len(questions), lines=8, shots=2, seed=settings["seed"])
    answer_of = {row["prompt"]: str(row["answer"]) for row in task.rows}
    model, tokenizer = student_and_tokenizer(lora_alpha=16)
    width = max(len(record.tokens) for record in report.nodes)
    teacher = report.teachers.index(TEACHER)

    def padded(values: Floats) -> Floats:
        wide: Floats = np.pad(np.asarray(values, float), (0, width - len(values)))
        return wide

    found = []
    for record, length in zip(report.nodes, lengths, strict=True):
        rollout = report.rollouts[record.rollout]
        ratio = np.log(record.teacher_probability[teacher].clip(1e-9)) - np.log(record.probability)
        slopes = padded(record.weight * (ratio - record.weight @ ratio / record.weight.sum()))
        success = padded(record.total / record.count)
        forced = padded(forced_answers(model, tokenizer, rollout, record, answer_of[rollout.prompt]))
        remaining = padded(~record.exact) * length / settings["max_new_tokens"]
        known = [1.0, record.depth / settings["max_new_tokens"], len(rollout.pieces) / settings["max_new_tokens"]]
        known += [float(rollout.correct), float(record.predictors["student_entropy"][teacher])]
        for draw in range(draws):
            # Even numbers are of one half of the questions: the halves learn from each other.
            name = 2 * (record.rollout * draws + draw) + questions.index(record.question) % 2
            outcome = (rng.random(width) < success).astype(float)
            columns = (slopes, padded(record.weight), success, [forced, outcome], [remaining], [remaining > 0], known)
            found.append((name, 1 / record.inclusion, *columns))
    stacked = [np.array(column) for column in zip(*found, strict=True)]
    stacked[1] = stacked[1] / stacked[1].mean()
    return NodeDraws(*stacked)


@torch.no_grad()
def forced_answers(
    model: torch.nn.Module, tokenizer: Any, rollout: RolloutRecord, node: NodeRecord, answer: str
) -> Floats:
    """Probability of the right answer behind each branch of a node, if the student had to give it there."""
    worth = []
    for token in node.tokens:
        text = ("".join(rollout.pieces[: node.depth]) + tokenizer.decode([int(token)])).rstrip("\n")
        begun = text.rpartition(MARK)[2].strip() if MARK in text else ""
        if not answer.startswith(begun):
            worth.append(0.0)
            continue
        rest = answer.removeprefix(begun)
        start = encode(tokenizer, rollout.prompt + text + ("" if MARK in text else f". {MARK}"))
        has_space = begun or (MARK in text and text.endswith(" "))
        end = encode(tokenizer, f"{rest}\n" if has_space else f" {rest}\n")
        logits = model(input_ids=torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
        log_probs = torch.log_softmax(logits.double(), dim=-1)
        worth.append(float(log_probs[torch.arange(len(end)), torch.tensor(end)].sum().exp()))
    return np.array(worth)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without special ones."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
