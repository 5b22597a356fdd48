"""Your own LightningModule, untouched: the callback finds the student in it.

Run: python examples/own_module.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from odp_callbacks import BaseTeacher, GradientAlignmentCallback, Teacher
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task


class FineTuning(LightningModule):
    """Any module that trains a peft model; here, plain fine-tuning on worked lines."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.policy = model
        self.tokenizer = tokenizer

    def training_step(self, rows, batch_idx):
        token_ids = torch.tensor([self.tokenizer(row["solution"])["input_ids"] for row in rows], device=self.device)
        return self.policy(input_ids=token_ids, labels=token_ids).loss

    def configure_optimizers(self):
        trainable_parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable_parameters, lr=1e-4)


model, tokenizer = load_student(None, print)
task = make_task("chain_sum", questions=16, lines=0, shots=2, seed=0)
callback = GradientAlignmentCallback(
    teachers={"answer": Teacher("The answer is {answer}.\n{prompt}"), "base": BaseTeacher()},
    prompts=task.rows,
    reward=task.reward,
    every_n_steps=2,
    questions_per_probe=6,
    rollouts_per_question=4,
    budget=0,  # update gain and the influence of tokens only, without continuations
    max_new_tokens=20,
    eos_token_ids=tuple(tokenizer("\n")["input_ids"]),
)
student = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")).train()
trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=[callback], logger=TensorBoardLogger("odp-demo", "own"))
trainer.fit(FineTuning(student, tokenizer), DataLoader(task.rows, batch_size=1, collate_fn=list))
for name, value in trainer.callback_metrics.items():
    if name.startswith("odp/update_gain/"):
        print(name, round(float(value), 3))
