"""Can the continuations that were paid for anyway sharpen update gain? Success gradients from nodes beside rollouts.

Two unbiased estimates of a question's success gradient: from rollouts, the mean of (r - b) grad ln pi(y), as update
gain uses it; and from nodes, the mean over rollouts of the ideal gradients sum_k p_k (Q_k - V) grad ln p_k at the
measured nodes, over the probability that the node is measured (Horvitz and Thompson). They are combined by inverse
variance; the weight of a question is estimated from the other questions, so the combination stays unbiased.

- *Exact*: worlds small enough to enumerate, against autograd through the expected reward. Also the bias of advantages
  that are telescoped between measured nodes.
- *Student*: SmolLM2 on sums. Half-widths of update gain from rollouts, from nodes and from the combination. And what
  the variance of update gain is made of: differences between questions, which no better gradient removes, and the
  noise of the gradient.

Run: python benchmarks/success_gradients.py [--questions 32] [--rollouts 4] [--budget 8000]
"""

import sys
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from example_tasks import example_task
from sizes import parse_sizes
from student import end_of_line, student_and_tokenizer
from torch import Tensor

from odp_callbacks.analysis.jackknife import jackknife
from odp_callbacks.analysis.update_gain import update_gain
from odp_callbacks.engine import Probe, ProbeConfig
from odp_callbacks.engine.gradients.step_sums import StepAccumulator
from odp_callbacks.engine.measurement import Measurement
from odp_callbacks.engine.update.update_rows import UpdateRows
from odp_callbacks.functional import lora_parameters
from odp_callbacks.records import Floats
from odp_callbacks.update_records import UpdateGram

USUAL = {
    "task": "chain_sum",
    "questions": 32,
    "rollouts": 4,
    "budget": 8000,
    "contexts": 4,
    "seed": 0,
    "exact_draws": 2000,
}
SMOKE = {"questions": 3, "rollouts": 2, "budget": 100, "contexts": 1, "exact_draws": 10}
BASELINE = 0.4
"""Of the single rollout of an enumerated question."""


def combined(from_rollouts: Tensor, from_nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two estimates ``(N, P)`` of each question's gradient; also the weights ``(N,)`` of the second one.

    The difference of the two has the mean zero, so it is a control variate. The weight is the regression coefficient
    that minimises the squared length of the error: sum <g, g - h> / sum |g - h|^2 over the other questions.
    """
    difference = from_nodes - from_rollouts
    inner, square = -(from_rollouts * difference).sum(dim=-1), difference.square().sum(dim=-1)
    others = 1 - torch.eye(len(inner), dtype=inner.dtype)
    squares = others @ square
    weights = torch.where(squares > 0, (others @ inner) / squares, 0.0).clamp(0, 1)
    return from_rollouts + weights[:, None] * difference, weights


@dataclass(frozen=True)
class Outcomes:
    """Everything that one rollout of an enumerated question and one measured node of it can give.

    Attributes:
        probability: ``(O,)``.
        from_rollout: ``(O, P)``, reward less baseline, times the gradient of the log-probability.
        from_node: ``(O, P)``, the ideal gradient at the node, over the probability that the node is measured.
        gradient: ``(P,)``, of the expected reward, by autograd.
        telescoped: ``(O, P)``: as from the rollout, but a token before the node has the node's success in place of the
            reward, and a token from the node on has it as its baseline.
    """

    probability: Tensor
    from_rollout: Tensor
    from_node: Tensor
    gradient: Tensor
    telescoped: Tensor


def enumerate_question(prompt: str) -> Outcomes:
    """Enumerate responses, measured nodes and the outcomes of one continuation of each branch."""
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.helpers.worlds import make_world

    world = make_world(size=3, horizon=2, prompt=prompt)
    nodes = world.solve()
    expectation = torch.softmax(nodes[()].logits, dim=-1) @ nodes[()].success
    parameters = list(lora_parameters(world.model).values())
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(expectation, parameters, retain_graph=True)])
    policy = {prefix: torch.softmax(node.logits.detach(), dim=-1) for prefix, node in nodes.items()}
    identity = torch.eye(world.size, dtype=torch.float64)
    scores = {prefix: world.parameter_gradients(node, *(identity - policy[prefix])) for prefix, node in nodes.items()}

    def worth(response: tuple[int, ...]) -> float:
        return world.table[world.text(response)]

    def outcomes(branch: tuple[int, ...]) -> list[tuple[float, float]]:
        if branch not in policy:
            return [(worth(branch), 1.0)]
        return [(worth((*branch, token)), float(policy[branch][token])) for token in range(world.size)]

    value = {prefix: float(policy[prefix] @ node.success.detach()) for prefix, node in nodes.items()}
    rows: list[tuple[float, Tensor, Tensor, Tensor]] = []
    for response, probability in world.responses().items():
        prefixes = [response[:depth] for depth in range(len(response))]
        of_tokens = [scores[prefix][token] for prefix, token in zip(prefixes, response, strict=True)]
        score = torch.stack(of_tokens).sum(0)
        for prefix in prefixes:  # one of them is measured, each with the same probability
            for found in product(*(outcomes((*prefix, token)) for token in range(world.size))):
                success = torch.tensor([reward for reward, _ in found], dtype=torch.float64)
                advantage = policy[prefix] * (success - policy[prefix] @ success)
                chance = probability / len(prefixes) * prod(chance for _, chance in found)
                of_node = len(prefixes) * (advantage @ scores[prefix])
                telescoped = sum(
                    (value[prefix] - BASELINE if depth < len(prefix) else worth(response) - value[prefix]) * of_token
                    for depth, of_token in enumerate(of_tokens)
                )
                rows.append((chance, (worth(response) - BASELINE) * score, of_node, telescoped))
    chances, from_rollouts, from_nodes, telescoped_rows = (list(column) for column in zip(*rows, strict=True))
    probabilities = torch.tensor(chances, dtype=torch.float64)
    return Outcomes(
        probabilities, torch.stack(from_rollouts), torch.stack(from_nodes), gradient, torch.stack(telescoped_rows)
    )


def print_exact(draws: int, seed: int) -> None:
    """Print the exact bias of each estimate, and the mean squared errors of many draws of 2 x 12 questions."""
    own, other = (enumerate_question(prompt) for prompt in ("a b", "b"))
    mean_combined = torch.zeros_like(own.gradient)
    for chance, of_rollout, of_node in zip(other.probability, other.from_rollout, other.from_node, strict=True):
        # The outcome of the other question decides the weight, so one call serves every outcome of the own question.
        weight = combined(torch.stack([of_rollout] * 2), torch.stack([of_node] * 2))[1][0]
        mean_combined += chance * (own.probability @ (own.from_rollout + weight * (own.from_node - own.from_rollout)))
    means = {
        "rollouts": own.probability @ own.from_rollout,
        "nodes": own.probability @ own.from_node,
        "combination": mean_combined,
    }
    generator = torch.Generator().manual_seed(seed)
    errors = torch.zeros(3, dtype=torch.float64)
    for _ in range(draws):
        places = [torch.multinomial(one.probability, 12, replacement=True, generator=generator) for one in (own, other)]
        rows, node_rows = (
            torch.cat([getattr(one, name)[chosen] for one, chosen in zip((own, other), places, strict=True)])
            for name in ("from_rollout", "from_node")
        )
        truth = torch.cat([one.gradient.expand(12, -1) for one in (own, other)])
        estimates = (rows, node_rows, combined(rows, node_rows)[0])
        errors += torch.stack([(estimate - truth).square().sum() for estimate in estimates])
    for (name, mean), error in zip(means.items(), errors, strict=True):
        bias = float((mean - own.gradient).norm() / own.gradient.norm())
        print(f"enumerated, {name}: bias {bias:.1e} of the gradient, squared error {float(error / errors[0]):.2f}")
    bias = float((own.probability @ own.telescoped - own.gradient).norm() / own.gradient.norm())
    print(f"enumerated, telescoped advantages: bias {bias:.1e} of the gradient")


class NodeRows(StepAccumulator):
    """Keeps the ideal gradients of each question, unsketched: the mean of both halves of the continuations."""

    def __init__(self) -> None:
        super().__init__(1, 0)
        self.rows: dict[str, Tensor] = {}

    def add_ideal(self, question: str, correct: bool, halves: Tensor) -> None:
        """Add ``(2, P)`` ideal gradients of a rollout."""
        self.rows[question] = self.rows.get(question, torch.zeros(halves.shape[1])) + halves.float().cpu().mean(dim=0)

    def add_distillation(self, question: str, correct: bool, gradients: Tensor) -> None:
        """Nothing: only ideal gradients are kept."""


def measure(sizes: dict[str, Any]) -> tuple[UpdateRows, Floats, Tensor, list[str]]:
    """Run one probe.

    Returns:
        The rows of update gain, the questions of each, the second estimate ``(F, P)``, and the teachers.
    """
    task = example_task(sizes["task"], sizes["questions"], seed=sizes["seed"], contexts=sizes["contexts"])
    student, tokenizer = student_and_tokenizer()
    config = ProbeConfig(
        rollouts_per_question=sizes["rollouts"],
        max_new_tokens=24,
        max_branches=3,
        tail_draws=1,
        influence=False,
        budget=sizes["budget"],
        eos_token_ids=end_of_line(tokenizer),
    )
    node_rows, kept = NodeRows(), {}
    gram, accumulators = UpdateRows.gram, Measurement.step_accumulators

    def gram_and_keep(rows: UpdateRows, questions: Floats) -> UpdateGram:
        kept["rows"], kept["questions"] = rows, questions
        return gram(rows, questions)

    with (
        mock.patch.object(UpdateRows, "gram", gram_and_keep),
        mock.patch.object(Measurement, "step_accumulators", lambda *given: [*accumulators(*given), node_rows]),
    ):
        report = Probe(student, tokenizer, task.reward, task.contexts, config).run(task.rows, seed=sizes["seed"])
    names = list(dict.fromkeys(rollout.question for rollout in report.rollouts))
    rows = kept["rows"]
    zero = torch.zeros(rows.success.shape[1])
    second = torch.stack([node_rows.rows.get(name, zero) for name in names]) / sizes["rollouts"]
    seconds = ", ".join(f"{stage} {taken:.0f} s" for stage, taken in report.stage_seconds.items())
    print(f"{len(report.nodes)} nodes, tokens {dict(report.generated_tokens)}; {seconds}")
    return rows, kept["questions"], second, list(report.teachers)


def print_student(sizes: dict[str, Any]) -> None:
    """Print half-widths of update gain, and what its variance is made of."""
    rows, questions, second, teachers = measure(sizes)
    first = rows.success.clone()
    both, weights = combined(first, second)
    squares = [float(of.square().sum(dim=1).mean()) for of in (first, second)]
    print(
        f"questions with a gradient: rollouts {int((first != 0).any(1).sum())}, nodes {int((second != 0).any(1).sum())}"
        f"; mean squared length: rollouts {squares[0]:.2f}, nodes {squares[1]:.2f}; weight of nodes "
        f"{float(weights.mean()):.2f}"
    )
    grams = {}
    for name, success in (("rollouts", first), ("nodes", second), ("combination", both)):
        rows.success = success
        grams[name] = rows.gram(questions)
    for number, teacher in enumerate(teachers):
        widths = {}
        for name, of_success in grams.items():
            figure = jackknife(update_gain([of_success], number))
            widths[name] = f"{name} {figure.value:+.3f} +- {figure.half_width:.3f}"
        print(f"{teacher}: update gain {', '.join(widths.values())}")
        directions = rows.directions[:, number].sum(dim=1).double()
        others = directions.sum(dim=0) - directions
        unit = others / others.norm(dim=1, keepdim=True)
        gains = np.stack([(of.double() * unit).sum(dim=1).numpy() for of in (first, second)])
        covariance = np.cov(gains)
        shared = covariance[0, 1]
        print(
            f"    variance of one question's gain: between questions {shared:.4f}, noise of rollouts "
            f"{covariance[0, 0] - shared:.4f}, of nodes {covariance[1, 1] - shared:.4f}"
        )


if __name__ == "__main__":
    arguments = parse_sizes(__doc__, USUAL, SMOKE)
    print_exact(arguments.pop("exact_draws"), arguments["seed"])
    print_student(arguments)
