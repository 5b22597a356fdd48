"""How far does the free mode agree with the full probe? Both on SmolLM2-135M, on other rollouts of the same questions.

Prints each teacher's predicted gain with its interval from both, the seconds, and the number of generated tokens.

Run: python benchmarks/free.py --questions 16
"""

from lightning.pytorch import seed_everything
from sizes import parse_sizes
from student import end_of_line, student_and_tokenizer

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.cli.tasks import make_task
from odp_callbacks.engine import Teacher, diagnose

USUAL = {"questions": 16, "rollouts": 4, "budget": 12_000, "seed": 0}
SMOKE = {"questions": 2, "rollouts": 1, "budget": 100}
TEACHERS = {
    "answer": Teacher("The answer is {answer}.\n{prompt}"),
    "wrong": Teacher("The answer is 77.\n{prompt}"),
}


def main(questions: int, rollouts: int, budget: int, seed: int) -> None:
    """Run both, and print."""
    seed_everything(seed, verbose=False)
    student, tokenizer = student_and_tokenizer(lora_alpha=16)
    task = make_task("chain_sum", questions=questions, lines=8, shots=2, seed=seed)
    for mode, mode_budget in (("free", 0), ("full", budget)):
        report = diagnose(
            student,
            tokenizer,
            task.rows,
            task.reward,
            TEACHERS,
            seed=seed + mode_budget,
            budget=mode_budget,
            rollouts_per_question=rollouts,
            max_new_tokens=20,
            eos_token_ids=end_of_line(tokenizer),
        )
        tokens, seconds = sum(report.generated_tokens.values()), sum(report.stage_seconds.values())
        analysis = Analysis(report)
        for summary in [*analysis.summaries(), *analysis.contrasts()]:
            if summary.split == "all":
                gain = summary.figures["predicted_gain"]
                print(
                    f"{mode} {summary.teacher:16} {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] "
                    f"{gain.questions} questions, {gain.nodes} nodes; {tokens} tokens, {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main(**parse_sizes(__doc__, USUAL, SMOKE))
