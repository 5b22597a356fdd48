"""Without training: in which context would the student be a good teacher of itself?

Run: python examples/diagnose.py
"""

from peft import LoraConfig, get_peft_model
from rich.console import Console

from odp_callbacks import Teacher, diagnose
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task
from odp_callbacks.visualization.table import summary_table

model, tokenizer = load_student(None, print)
task = make_task("chain_sum", questions=8, lines=0, shots=2, seed=1)
report = diagnose(
    get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")),
    tokenizer,
    task.rows,
    task.reward,
    {
        "answer": Teacher("The answer is {answer}.\n{prompt}"),
        "solution": Teacher("{solution}\n{prompt}"),
        "careful": Teacher(lambda row: "Check every sum.\n" + row["prompt"]),
    },
    rollouts_per_question=4,
    budget=0,  # update gain and the influence of tokens only, without continuations
    max_new_tokens=20,
    eos_token_ids=tuple(tokenizer("\n")["input_ids"]),
)
Console().print(summary_table(report))
