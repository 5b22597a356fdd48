"""Several teachers: each class of tokens is distilled from the one that measurably helps it most.

Run: python examples/several_teachers.py
"""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from odp_callbacks import GradientAlignmentCallback, OnPolicyDistillation, Teacher, TeacherRouter
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task

model, tokenizer = load_student(None, print)
task = make_task("chain_sum", questions=16, lines=0, shots=2, seed=0)
student = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")).train()
newline = tuple(tokenizer("\n")["input_ids"])
# The names must be the same in training and in the probes: the router finds what it learned by them.
teachers = {"answer": Teacher("The answer is {answer}.\n{prompt}"), "solution": Teacher("{solution}\n{prompt}")}
router = TeacherRouter(explore=0.1)

module = OnPolicyDistillation(
    student, tokenizer, teachers, reward=task.reward, gate=router, max_new_tokens=20, eos_token_ids=newline
)
callback = GradientAlignmentCallback(
    teachers,
    task.rows,
    task.reward,
    every_n_steps=2,
    at_start=True,
    questions_per_probe=3,
    rollouts_per_question=2,
    continuations=2,
    max_new_tokens=20,
    eos_token_ids=newline,
)
trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=[callback], logger=TensorBoardLogger("odp-demo", "several"))
trainer.fit(module, DataLoader(task.rows, batch_size=4, collate_fn=list))
for key in router.evidence.classes():
    gains = {name: round(router.evidence.estimate(key, name).value, 3) for name in teachers}
    print(key, router.teacher(key) or "answer (the first)", gains)
