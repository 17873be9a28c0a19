"""What people write by hand: SFTTrainer with LoRA. `torchrun hand_written.py MODEL ROWS OUT`."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model, rows, output = sys.argv[1:]
arguments = SFTConfig(
    output_dir=output,
    per_device_train_batch_size=8,
    max_steps=20,
    max_length=128,
    logging_steps=1,
    learning_rate=2e-4,
    assistant_only_loss=True,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    report_to="none",
    ddp_find_unused_parameters=False,
    model_init_kwargs={"dtype": torch.float32},
)
trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
)
print(f"world size {trainer.accelerator.num_processes}", flush=True)
trainer.train()
