"""Fabric: TMKL is the one line with attach, before fabric.setup. `python examples/fabric_loop.py`"""

import argparse

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from mask_the_target import TMKL, attach

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

fabric = lightning.Fabric()
fabric.launch()
tokenizer = AutoTokenizer.from_pretrained(options.model)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), lora).train()
rows = []
for number in range(100, 100 + 8 * options.steps):  # your data: only what has a label is learned
    chat = [{"role": "user", "content": f"Write {number} backwards."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(f"{number}"[::-1] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
loader = torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=DataCollatorForSeq2Seq(tokenizer))

attachment = attach(model, TMKL(weight=1.0))
wrapped, optimizer = fabric.setup(model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3))
for step, batch in enumerate(fabric.setup_dataloaders(loader), start=1):
    fabric.backward(wrapped(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(f"step {step}: ce {float(attachment.last.ce):.4f}, kl {float(attachment.last.kl):.4f}")
model.save_pretrained("runs/fabric_loop")
