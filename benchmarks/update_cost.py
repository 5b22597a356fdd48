"""What a look at update gain costs, against a training step on the same rollouts with one teacher.

Run: python benchmarks/update_cost.py

A look measures update gain for one and for four teachers, with and without the influence of tokens; the forwards of its
teachers are subtracted, each as it takes alone. A training step is that of OnPolicyDistillation: forward of the
teacher, forward and backward of the student, optimizer; also with the sampling of its rollouts. All arms run in turn,
in one process, and the median counts. On a CPU the time is that of the processor, since others may use the machine.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sizes import parse_sizes
from student import end_of_line, sums

from odp_callbacks import OnPolicyDistillation, Teacher
from odp_callbacks.cli.models import load_student
from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.engine.prompts import Question, as_questions
from odp_callbacks.engine.rollouts import Rollout, sample_rollouts
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.teachers import teacher_logits, teacher_prompt_ids
from odp_callbacks.engine.update.gradient_rows import UpdateGradients
from odp_callbacks.engine.update.measurement import UpdateMeter
from odp_callbacks.engine.update.shared_prompts import SHARED_PROMPTS

USUAL = {"questions": 4, "rollouts": 4, "tokens": 24, "repeats": 2, "factor": 3, "layers": 30}
SMOKE = {"questions": 2, "rollouts": 2, "tokens": 3, "repeats": 1, "factor": 2, "layers": 2}
TEACHERS = {
    "answer": Teacher("The answer is {answer}. {prompt}"),
    "hint": Teacher("Hint: it is {answer}. {prompt}"),
    "wrong": Teacher("The answer is 7. {prompt}"),
    "careful": Teacher("Think carefully about this. {prompt}"),
}


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of the processor, or of the clock where an accelerator works."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    before = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - before


def random_rollouts(questions: list[Question], per_question: int, tokens: int) -> list[Rollout]:
    """Responses of one half to the whole of ``tokens`` random tokens; one of each question is correct."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for question in questions:
        for number in range(per_question):
            length = int(torch.randint((tokens + 1) // 2, tokens + 1, (), generator=generator))
            response = torch.randint(1000, 40_000, (length,), generator=generator).tolist()
            found.append(Rollout(question, tuple(response), "", False, float(number == 0)))
    return found


class Bench:
    """A student of one LoRA rank with the first layers of SmolLM2, and what can be timed with it."""

    def __init__(self, rank: int, layers: int) -> None:
        model, self.tokenizer = load_student(None, print)
        model.model.layers = model.model.layers[:layers]
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.student: Any = get_peft_model(model, lora).eval()
        self.student.to("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.student.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))

    def questions(self, count: int) -> list[Question]:
        return as_questions(sums(count, 0)[1], self.tokenizer)

    def look(self, rollouts: list[Rollout], teachers: int, influence: bool) -> None:
        chosen = dict(list(TEACHERS.items())[:teachers])
        direction = distillation_direction("reverse_kl", None, None, 1.0)
        gradients = UpdateGradients(self.student, self.tokenizer, chosen, direction, 1.0)
        UpdateMeter(gradients).measure(rollouts, influence=influence)

    def look_as_before(self, rollouts: list[Rollout], teachers: int, influence: bool) -> None:
        """The way before: a batch for each group and class, and every rollout with a prompt of its own."""
        chosen = dict(list(TEACHERS.items())[:teachers])
        direction = distillation_direction("reverse_kl", None, None, 1.0)
        gradients = UpdateGradients(self.student, self.tokenizer, chosen, direction, 1.0)
        gradients.no_segments = "the way before"
        with unshared_prompts():
            UpdateMeter(gradients).measure(rollouts, influence=influence)

    def teacher_forwards(self, rollouts: list[Rollout], teachers: int) -> None:
        with torch.no_grad():
            for teacher in list(TEACHERS.values())[:teachers]:
                teacher_logits(
                    teacher,
                    self.student,
                    [teacher_prompt_ids(teacher, self.tokenizer, rollout.question) for rollout in rollouts],
                    [rollout.response_ids for rollout in rollouts],
                    [range(len(rollout.response_ids)) for rollout in rollouts],
                )

    def make_step(self, rollouts: list[Rollout]) -> Callable[[], None]:
        module = OnPolicyDistillation(self.student, self.tokenizer, TEACHERS["answer"], learning_rate=0.0)
        optimizer: Any = module.configure_optimizers()

        def step() -> None:
            losses = module.token_losses(rollouts)
            ((losses.losses * losses.mask).sum() / losses.mask.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def sample(self, questions: list[Question], per_question: int, tokens: int) -> None:
        with torch.no_grad():
            sample_rollouts(
                self.student, self.tokenizer, questions, per_question=per_question, max_new_tokens=tokens,
                temperature=1.0, eos_token_ids=end_of_line(self.tokenizer), randomness=Randomness(0), batch_size=256,
            )  # fmt: skip


@contextmanager
def unshared_prompts() -> Iterator[None]:
    """No prompt is shared within the block."""
    verdicts: Any = SHARED_PROMPTS
    verdicts.work = lambda *_: False
    try:
        yield
    finally:
        del verdicts.work


def in_turn(arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each arm; the first round, which has the trials of the model, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repeats + 1):
        for name, work in arms.items():
            spent = seconds_of(work)
            if number:
                seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_ratios(bench: Bench, questions: int, rollouts: int, tokens: int, repeats: int) -> None:
    """Looks against a training step, and against the way before."""
    asked = bench.questions(questions)
    answered = random_rollouts(asked, rollouts, tokens)
    arms: dict[str, Callable[[], Any]] = {
        "step": bench.make_step(answered),
        "sampling": lambda: bench.sample(asked, rollouts, tokens),
    }
    for count in (1, 4):
        arms[f"forwards {count}"] = lambda count=count: bench.teacher_forwards(answered, count)
        for influence in (False, True):
            arms[f"look {count} {influence}"] = lambda c=count, i=influence: bench.look(answered, c, i)
    arms["before"] = lambda: bench.look_as_before(answered, 4, True)
    seconds = in_turn(arms, repeats)
    prompt = statistics.mean(len(question.prompt_ids) for question in asked)
    response = sum(len(rollout.response_ids) for rollout in answered)
    print(f"{questions} questions x {rollouts} rollouts, prompts of {prompt:.0f} tokens, {response} response tokens")
    print(f"training step {seconds['step']:.2f} s, sampling of its rollouts {seconds['sampling']:.2f} s")
    print("teachers influence     look  forwards   (look - forwards) / step   ... / (step + sampling)")
    for count in (1, 4):
        for influence in (False, True):
            look, forwards = seconds[f"look {count} {influence}"], seconds[f"forwards {count}"]
            ratio = (look - forwards) / seconds["step"]
            sampled = (look - forwards) / (seconds["step"] + seconds["sampling"])
            print(f"{count:8} {influence!s:>9} {look:7.2f} s {forwards:7.2f} s {ratio:26.2f} {sampled:25.2f}")
    print(f"the way before, 4 teachers with influence: {seconds['before'] / seconds['look 4 True']:.2f} x this look")


def print_growth(bench: Bench, wide: Bench, factor: int, repeats: int, tokens: int) -> None:
    """Exponents of a look's time, with influence."""
    few, many = bench.questions(2), bench.questions(2 * factor)
    base = random_rollouts(few, 2, tokens)
    arms: dict[str, Callable[[], Any]] = {
        "base": lambda: bench.look(base, 1, True),
        "rollouts": lambda: bench.look(random_rollouts(many, 2, tokens), 1, True),
        "length": lambda: bench.look(random_rollouts(few, 2, factor * tokens), 1, True),
        "teachers": lambda: bench.look(base, factor, True),
        "LoRA rank": lambda: wide.look(base, 1, True),
    }
    seconds = in_turn(arms, repeats)
    print(f"growth exponents from {factor} times as many (LoRA rank: 8 times)")
    for name in list(arms)[1:]:
        by = 8 if name == "LoRA rank" else factor
        print(f"{name:10} {math.log(seconds[name] / seconds['base']) / math.log(by):5.2f}")


def main(questions: int, rollouts: int, tokens: int, repeats: int, factor: int, layers: int) -> None:
    """Print both tables."""
    bench = Bench(8, layers)
    print_ratios(bench, questions, rollouts, tokens, repeats)
    print_growth(bench, Bench(64, layers), factor, repeats, tokens)


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
