"""Fabric: TMKL is the one line with attach, before fabric.setup. `python examples/fabric_loop.py`"""

import argparse

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from mask_the_target import TMKL, attach
from mask_the_target.front.backbones import resolve_model
from mask_the_target.front.probes import encode_row
from mask_the_target.front.recipes import recipe_rows

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="package:smollm2")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

fabric = lightning.Fabric()
fabric.launch()
path = resolve_model(options.model)
tokenizer = AutoTokenizer.from_pretrained(path)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora).train()
rows = []
for row in recipe_rows("arpabet")["train"][: 8 * options.steps]:
    prompt, answer = encode_row(tokenizer, row)
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
