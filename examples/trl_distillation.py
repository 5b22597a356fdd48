"""TRL: measure and gate its `DistillationTrainer`; `SFTTrainer` trains the teacher on answers first.

Run: python examples/trl_distillation.py
"""

from copy import deepcopy

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from odp_callbacks import GradientAlignmentTrainerCallback, IncorrectRolloutGate, ModelTeacher, gate_trainer
from odp_callbacks.cli.models import load_student
from odp_callbacks.cli.tasks import make_task

model, tokenizer = load_student(None, print)
task = make_task("chain_sum", questions=16, lines=0, shots=2, seed=0)
newline = tuple(tokenizer("\n")["input_ids"])
common = {"report_to": ["tensorboard"], "logging_steps": 1, "save_strategy": "no", "bf16": False, "use_cpu": True}

answers = Dataset.from_list([{"prompt": r["prompt"], "completion": f" {r['answer']}\n"} for r in task.rows])
config = SFTConfig("odp-demo/teacher", max_steps=4, per_device_train_batch_size=4, learning_rate=5e-5, **common)
sft_trainer = SFTTrainer(deepcopy(model), config, train_dataset=answers, processing_class=tokenizer)
sft_trainer.train()
teacher = sft_trainer.model.eval().requires_grad_(False)

student = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM"))
student.generation_config.eos_token_id = list(newline)
config = DistillationConfig(
    "odp-demo/trl", max_steps=2, per_device_train_batch_size=4, max_completion_length=20, learning_rate=1e-4, **common
)
trainer = DistillationTrainer(
    student, teacher, config, train_dataset=Dataset.from_list(task.rows), processing_class=tokenizer
)
gate_trainer(trainer, IncorrectRolloutGate(), task.reward)
callback = GradientAlignmentTrainerCallback(
    trainer,
    {"fine-tuned": ModelTeacher(teacher)},
    task.rows,
    task.reward,
    every_n_steps=2,
    max_overhead=None,  # a run of two steps leaves too little time for both measurements
    update_every_n_steps=1,  # the update gain of the training's own rollouts, which are those of the step just taken
    questions_per_probe=3,
    rollouts_per_question=2,
    continuations=2,
    max_new_tokens=20,
    eos_token_ids=newline,
)
trainer.add_callback(callback)
trainer.train()
shown = ("gate/", "odp/gate", "odp/update_gain", "odp/training/update_gain", "odp/training/success_rate")
for row in trainer.state.log_history:
    print({name: round(float(value), 3) for name, value in row.items() if name.startswith(shown)})
