"""Unsloth with TMKL, the last line of the trainer: `python examples/unsloth_sft.py`."""

from unsloth import FastLanguageModel  # isort: skip  # first, as Unsloth asks: it patches what is imported after it

import argparse

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from mask_the_target import TMKL, TMKLCallback

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="runs/unsloth_sft")
options = parser.parse_args()

model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=512, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing="unsloth")
rows = []
for number in range(100, 100 + 8 * options.steps):  # your data
    prompt = [{"role": "user", "content": f"Write {number} backwards."}]
    rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": f"{number}"[::-1]}]})
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(output_dir=options.output, max_steps=options.steps, learning_rate=1e-3, logging_steps=1),
    train_dataset=Dataset.from_list(rows),
    callbacks=[TMKLCallback(TMKL(weight=1.0))],
)
trainer.train()
trainer.save_model()  # a plain PEFT adapter
