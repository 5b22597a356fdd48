"""A loss of your own, in the measurement and in the training: a function of both models' logits.

Run: python examples/custom_loss.py
"""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader

from odp_callbacks import GradientAlignmentCallback, OnPolicyDistillation, Teacher
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task


def cosine_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """From logits ``(N, V)`` of both to losses ``(N,)``: one minus the cosine of the two distributions."""
    return 1 - cosine_similarity(student_logits.softmax(-1), teacher_logits.softmax(-1), dim=-1)


model, tokenizer = load_student(None, print)
task = make_task("chain_sum", questions=16, lines=0, shots=2, seed=0)
student = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")).train()
teacher = {"solution": Teacher("{solution}\n{prompt}")}
newline = tuple(tokenizer("\n")["input_ids"])
module = OnPolicyDistillation(
    student, tokenizer, teacher, divergence=cosine_loss, max_new_tokens=20, eos_token_ids=newline
)
callback = GradientAlignmentCallback(
    teacher,
    task.rows,
    task.reward,
    divergence=cosine_loss,
    every_n_steps=2,
    questions_per_probe=6,
    rollouts_per_question=4,
    budget=0,  # update gain and the influence of tokens only, without continuations
    max_new_tokens=20,
    eos_token_ids=newline,
)
trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=[callback], logger=TensorBoardLogger("odp-demo", "loss"))
trainer.fit(module, DataLoader(task.rows, batch_size=4, collate_fn=list))
for name, value in trainer.callback_metrics.items():
    if name.startswith("odp/update_gain/"):
        print(name, round(float(value), 3))
