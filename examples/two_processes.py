"""Two processes with Lightning's DDP, which share the questions of each probe.

Run: python examples/two_processes.py
"""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from odp_callbacks import GradientAlignmentCallback, OnPolicyDistillation, Teacher
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task

if __name__ == "__main__":  # DDP runs this file a second time
    model, tokenizer = load_student(None, print)
    task = make_task("chain_sum", questions=16, lines=0, shots=2, seed=0)
    student = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM")).train()
    teacher = {"answer": Teacher("The answer is {answer}.\n{prompt}")}
    newline = tuple(tokenizer("\n")["input_ids"])
    callback = GradientAlignmentCallback(
        teacher,
        task.rows,
        task.reward,
        every_n_steps=2,
        questions_per_probe=4,  # two in each process
        rollouts_per_question=2,
        continuations=2,
        max_new_tokens=20,
        eos_token_ids=newline,
    )
    module = OnPolicyDistillation(
        student, tokenizer, teacher, reward=task.reward, max_new_tokens=20, eos_token_ids=newline
    )
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[callback],
        logger=TensorBoardLogger("odp-demo", "two"),
    )
    trainer.fit(module, DataLoader(task.rows, batch_size=2, collate_fn=list))
    questions = {rollout.question for rollout in callback.last_report.rollouts}
    print(f"process {trainer.global_rank} has the records of {len(questions)} questions: {sorted(questions)}")
