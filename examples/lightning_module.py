"""Lightning: TMKL is the one callback. `python examples/lightning_module.py`"""

import argparse

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from mask_the_target import TMKL
from mask_the_target.integrations.lightning import TMKLCallback


class Reverser(lightning.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(name), lora
        ).train()  # Lightning keeps the mode

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
rows = []
for number in range(100, 100 + 8 * options.steps):  # your data: only what has a label is learned
    chat = [{"role": "user", "content": f"Write {number} backwards."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(f"{number}"[::-1] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
loader = torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=DataCollatorForSeq2Seq(tokenizer))

module = Reverser(options.model)
tmkl = TMKLCallback(TMKL(weight=1.0))
trainer = lightning.Trainer(max_epochs=1, log_every_n_steps=1, enable_checkpointing=False, callbacks=[tmkl])
trainer.fit(module, loader)
print({name: round(float(value), 4) for name, value in trainer.logged_metrics.items()})
module.model.save_pretrained("runs/lightning_module")
