"""How far does the free mode agree with the full probe? Both on SmolLM2-135M, on other rollouts of the same questions.

    python benchmarks/free.py --questions 16

Prints each teacher's predicted gain with its interval from both, their seconds, and the tokens they generated.
"""

import argparse
from typing import Any

from lightning.pytorch import seed_everything
from peft import LoraConfig, get_peft_model

from odp_callbacks.analysis.summaries import Analysis
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task
from odp_callbacks.engine import Teacher, diagnose


def main() -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--budget", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seed_everything(options.seed, verbose=False)
    model, tokenizer = load_student(None, print)
    task = make_task("chain_sum", questions=options.questions, lines=8, shots=2, seed=options.seed)
    student: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")).eval()
    teachers = {
        "answer": Teacher("The answer is {answer}.\n{prompt}"),
        "wrong": Teacher("The answer is 77.\n{prompt}"),
    }
    end = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
    for name, budget in (("free", 0), ("full", options.budget)):
        report = diagnose(
            student,
            tokenizer,
            task.rows,
            task.reward,
            teachers,
            seed=options.seed + budget,
            budget=budget,
            rollouts_per_question=options.rollouts,
            max_new_tokens=20,
            eos_token_ids=end,
        )
        tokens, seconds = sum(report.generated_tokens.values()), sum(report.seconds.values())
        analysis = Analysis(report)
        for summary in [*analysis.summaries(), *analysis.contrasts()]:
            if summary.split == "all":
                f = summary.figures["predicted_gain"]
                print(
                    f"{name} {summary.teacher:16} {f.value:+.4f} [{f.low:+.4f}, {f.high:+.4f}] "
                    f"{f.questions} questions, {f.nodes} nodes; {tokens} tokens, {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
