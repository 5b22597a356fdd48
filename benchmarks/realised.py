"""Is update gain true? Steps are taken on SmolLM2-135M, and success afterwards is compared with what was predicted.

The contexts of `examples/diagnose` are the teachers. From 24 questions with 4 rollouts each come the distillation
gradient of every context under every weighting of tokens (all, correct, incorrect rollouts, published rules) and its
update gain. Then the LoRA parameters are moved along that direction, by a stated length in their Euclidean norm: plain
gradient descent ("SGD"), or preconditioned with second moments of six mini-batches ("Adam"). Success is sampled on 32
other questions, 12 rollouts each, with the same random numbers before and after. Realised is the change of success per
unit of length. Two predictions stand beside it:

- predicted: update gain from the 24 questions alone, as the library reports it;
- held-out slope: the same direction along the success gradient of the 32 held-out questions, from rollouts of their own
  (8 a question). Where realised differs from it by more than noise, the step was too long for a slope.

Dead reckoning: `OnPolicyDistillation` trains 12 steps; the callback's `odp/step/gain` is summed, and success on the
held-out questions is measured at the start and at the end.

Every measurement is a line of `results/realised.jsonl`; the same command, started again, goes on. `--report` prints the
tables of what is there.

Run: python benchmarks/realised.py [--task chain_sum | products] [--seed 0] [--report]
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dead_reckoning import train
from example_tasks import TASKS, example_task
from realised_tables import report_tables
from sizes import size_parser
from student import end_of_line, student_and_tokenizer
from torch import Tensor
from update_directions import QuestionGradients, question_gradients, success_gradients

from odp_callbacks.analysis.jackknife import jackknife
from odp_callbacks.analysis.update_gain import update_gain as update_gain_estimator
from odp_callbacks.engine.prompts import Question, as_questions
from odp_callbacks.engine.rollouts import Rollout, end_tokens, sample_rollouts, score_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teachers import as_teachers
from odp_callbacks.engine.verifier import Verifier
from odp_callbacks.functional import lora_parameters, update_gain
from odp_callbacks.gates.rules import RULES
from odp_callbacks.update_records import gram_of_rows

RESULTS_FILE = Path(__file__).parent / "results" / "realised.jsonl"
ALL, CORRECT, INCORRECT = "everything", "correct rollouts", "incorrect rollouts"
SGD, ADAM = "SGD", "Adam"
MAIN_LENGTH = 0.3
MINI_BATCHES = 6
"""Of which the second moments are the mean."""
EPSILON = 1e-8
USUAL = {
    "questions": 24,
    "contexts": 4,
    "rollouts": 4,
    "held_out": 32,
    "held_out_rollouts": 12,
    "gradient_rollouts": 8,
    "max_new_tokens": 24,
    "lengths": [0.1, MAIN_LENGTH, 1.0],
    "steps": 12,
    "seed": 0,
    "rules": ["high entropy", "prefix"],
    "trainings": ["solution", "wrong answer"],
}
SMOKE = {
    "questions": 3,
    "contexts": 2,
    "rollouts": 2,
    "held_out": 2,
    "held_out_rollouts": 2,
    "gradient_rollouts": 2,
    "max_new_tokens": 3,
    "lengths": [MAIN_LENGTH],
    "steps": 1,
    "rules": [],
    "trainings": ["solution"],
}
Line = dict[str, Any]
Cell = tuple[str, str, str]
"""Context, weighting and geometry."""


class Experiment:
    """One task, one seed: measures what is not kept yet.

    Args:
        given: The command line.
        results_file: Where lines are kept.
    """

    def __init__(self, given: argparse.Namespace, results_file: Path) -> None:
        self.given, self.results_file = given, results_file
        torch.manual_seed(given.seed)
        self.student, self.tokenizer = student_and_tokenizer()
        self.task = example_task(given.task, given.questions + given.held_out, given.seed, given.contexts)
        self.teachers = as_teachers(self.task.contexts)
        self.eos_token_ids = end_tokens(self.student, self.tokenizer, end_of_line(self.tokenizer))
        questions = as_questions(self.task.rows, self.tokenizer)
        questions = [replace(question, id=str(place)) for place, question in enumerate(questions)]
        self.questions, self.held_out = questions[: given.questions], questions[given.questions :]
        self.rules = {name: RULES[name] for name in (CORRECT, INCORRECT, *given.rules)}

    def run(self) -> None:
        """Measure in order of importance: one length for all directions, then other lengths, then trainings."""
        if missing := self.cells():
            print(f"success before {np.mean(self.base_success()):.3f}; {len(missing)} steps to take", flush=True)
            directions = self.directions()
            for cell, length in missing:
                if cell in directions:  # there may be no correct rollout, for example
                    self.take_step(cell, length, directions[cell])
        for context in self.given.trainings:
            if not self.kept("training", (context, ALL, ADAM)):
                self.keep("training", (context, ALL, ADAM), train(self, context))

    def cells(self) -> list[tuple[Cell, float]]:
        """The steps that are not kept yet, the most important first."""
        contexts, lengths = self.task.contexts, self.given.lengths
        main = MAIN_LENGTH if MAIN_LENGTH in lengths else lengths[0]
        steps = [((context, name, SGD), main) for name in (ALL, *self.rules) for context in contexts]
        steps += [((context, ALL, ADAM), main) for context in contexts]
        steps += [((context, ALL, SGD), length) for length in lengths if length != main for context in contexts]
        kept = {(*self.cell_of(line), line["length"]) for line in self.lines("step")}
        return [step for step in steps if (*step[0], step[1]) not in kept]

    def base_success(self) -> list[float]:
        """Success of the held-out questions before any step."""
        for line in self.lines("base"):
            return list(line["success"])
        line = self.success()
        self.keep("base", ("", "", ""), line)
        return list(line["success"])

    def directions(self) -> dict[Cell, Tensor]:
        """The direction ``(P,)`` of each cell, of length 1; its predictions are kept."""
        start = time.perf_counter()
        rollouts = self.sample(self.questions, self.given.rollouts, seed=self.given.seed)
        gradients = question_gradients(self.student, self.tokenizer, self.teachers, rollouts, self.rules)
        ours = self.sample(self.held_out, self.given.gradient_rollouts, seed=self.given.seed + 1000)
        held_out = success_gradients(self.student, ours)
        print(f"gradients in {time.perf_counter() - start:.0f} s", flush=True)
        directions: dict[Cell, Tensor] = {}
        for context_index, context in enumerate(self.task.contexts):
            parts = gradients.directions[:, context_index]  # (N, W, P)
            second_moments = torch.stack(
                [part[:, :2].sum(dim=(0, 1)) ** 2 for part in parts.chunk(min(MINI_BATCHES, len(parts)))]
            ).mean(dim=0)
            scales = {SGD: torch.ones_like(second_moments), ADAM: 1 / (second_moments.sqrt() + EPSILON)}
            for geometry, scale in scales.items():
                for name, weights in self.weights_of_parts().items():
                    own = torch.einsum("nwp,w->np", parts, weights) * scale
                    cell, whole = (context, name, geometry), own.sum(dim=0)
                    if whole.any():
                        directions[cell] = whole / whole.norm()
                        self.keep_prediction(cell, gradients, own, held_out @ directions[cell], context_index)
        return directions

    def weights_of_parts(self) -> dict[str, Tensor]:
        """Weights of the rules' directions in each weighting; everything is correct and incorrect rollouts together."""
        one_hot = dict(zip(self.rules, torch.eye(len(self.rules)), strict=True))
        return {ALL: one_hot[CORRECT] + one_hot[INCORRECT], **one_hot}

    def keep_prediction(
        self, cell: Cell, gradients: QuestionGradients, own: Tensor, slopes: Tensor, context_index: int
    ) -> None:
        if self.kept("predicted", cell):
            return
        count = len(own)
        gram = gram_of_rows(
            np.ones(count), np.ones((count, 1)), gradients.success.double().numpy(), own[:, None, None].double().numpy()
        )
        estimate = jackknife(update_gain_estimator([gram], 0, (1.0,)))
        share = float((gradients.share[context_index] * self.weights_of_parts()[cell[1]]).sum())
        gains = update_gain(gradients.success.double(), own.double())
        self.keep(
            "predicted",
            cell,
            {
                "gain": [estimate.value, estimate.low, estimate.high],
                "gains": gains.tolist(),
                "slopes": slopes.tolist(),
                "token_share": share,
            },
        )

    def take_step(self, cell: Cell, length: float, direction: Tensor) -> None:
        start = time.perf_counter()
        with self.moved_by(length * direction):
            line = self.success()
        self.keep("step", cell, {"length": length, **line})
        print(
            f"{' / '.join(cell)}, length {length}: success {np.mean(line['success']):.3f} "
            f"in {time.perf_counter() - start:.0f} s",
            flush=True,
        )

    @contextmanager
    def moved_by(self, step: Tensor) -> Iterator[None]:
        """Move the LoRA parameters, and put them back bit for bit."""
        parameters = list(lora_parameters(self.student).values())
        before = [parameter.detach().clone() for parameter in parameters]
        parts = step.split([parameter.numel() for parameter in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter += part.view_as(parameter)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

    def success(self) -> Line:
        """Success of each held-out question, with the same random numbers each time; length of the responses."""
        rollouts = self.sample(self.held_out, self.given.held_out_rollouts, seed=self.given.seed + 2000)
        rewards = np.array([rollout.reward for rollout in rollouts]).reshape(len(self.held_out), -1)
        return {
            "success": [round(value, 4) for value in rewards.mean(axis=1).tolist()],
            "tokens": float(np.mean([len(rollout.response_ids) for rollout in rollouts])),
            "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        }

    def sample(self, questions: Sequence[Question], per_question: int, seed: int) -> list[Rollout]:
        with torch.no_grad():
            rollouts = sample_rollouts(
                self.student,
                self.tokenizer,
                questions,
                per_question=per_question,
                max_new_tokens=self.given.max_new_tokens,
                temperature=1.0,
                eos_token_ids=self.eos_token_ids,
                randomness=Randomness(seed),
                batch_size=128,
            )
        return score_rollouts(Verifier(self.task.reward), rollouts)

    @staticmethod
    def cell_of(line: Line) -> Cell:
        return line["context"], line["weighting"], line["geometry"]

    def kept(self, kind: str, cell: Cell) -> bool:
        return any(self.cell_of(line) == cell for line in self.lines(kind))

    def lines(self, kind: str) -> list[Line]:
        """The kept lines of this task, seed and size."""
        identity = {"kind": kind, **self.identity()}
        return [line for line in kept_lines(self.results_file) if identity.items() <= line.items()]

    def identity(self) -> Line:
        names = ("task", "seed", "questions", "rollouts", "held_out", "held_out_rollouts")
        return {name: getattr(self.given, name) for name in names}

    def keep(self, kind: str, cell: Cell, values: Line) -> None:
        line = {"kind": kind, **self.identity(), **dict(zip(("context", "weighting", "geometry"), cell, strict=True))}
        self.results_file.parent.mkdir(parents=True, exist_ok=True)
        with self.results_file.open("a") as file:
            file.write(json.dumps({**line, **values}) + "\n")


def kept_lines(results_file: Path) -> list[Line]:
    return [json.loads(line) for line in results_file.read_text().splitlines()] if results_file.exists() else []


def parse_arguments() -> argparse.Namespace:
    parser = size_parser(__doc__, USUAL, SMOKE)
    parser.add_argument("--task", default=TASKS[0], choices=TASKS)
    parser.add_argument("--report", action="store_true", help="print the tables of what is kept, and measure nothing")
    return parser.parse_args()


def measure(given: argparse.Namespace, results_file: Path) -> None:
    Experiment(given, results_file).run()
    print(report_tables(kept_lines(results_file)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    arguments = parse_arguments()
    if arguments.report:
        print(report_tables(kept_lines(RESULTS_FILE)))
    elif arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder) / RESULTS_FILE.name)
    else:
        measure(arguments, RESULTS_FILE)
