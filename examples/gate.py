"""A gate: distil incorrect rollouts only, and compare it with other rules.

Run: python examples/gate.py
"""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.utils.data import DataLoader

from odp_callbacks import (
    GradientAlignmentCallback,
    IncorrectRolloutGate,
    OnPolicyDistillation,
    ProbeConfig,
    Teacher,
    score_rules,
)
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task
from odp_callbacks.visualization.table import rules_table

model, tokenizer = load_student(None, print)
task = make_task("chain_sum", questions=16, lines=0, shots=2, seed=0)
student = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")).train()
teacher = {"solution": Teacher("{solution}\n{prompt}")}
newline = tuple(tokenizer("\n")["input_ids"])

module = OnPolicyDistillation(
    student,
    tokenizer,
    teacher,
    reward=task.reward,
    gate=IncorrectRolloutGate(),  # or AlignmentGate(), or any function of the tokens
    max_new_tokens=20,
    eos_token_ids=newline,
)
callback = GradientAlignmentCallback(
    teacher,
    task.rows,
    task.reward,
    every_n_steps=2,
    questions_per_probe=3,
    config=ProbeConfig(rollouts_per_question=2, continuations=2, max_new_tokens=20, eos_token_ids=newline),
)
trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=[callback], logger=TensorBoardLogger("odp-demo", "gate"))
trainer.fit(module, DataLoader(task.rows, batch_size=4, collate_fn=list))
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items() if "train/gate" in name})
Console().print(rules_table(score_rules(callback.last_report)))
