"""Lightning: TMKL is the one callback. `python examples/lightning_module.py`"""

import argparse

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from mask_the_target import TMKL
from mask_the_target.front.backbones import resolve_model
from mask_the_target.front.probes import encode_row
from mask_the_target.front.recipes import recipe_rows
from mask_the_target.integrations.lightning import TMKLCallback


class Speller(lightning.LightningModule):
    def __init__(self, path: str) -> None:
        super().__init__()
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(path), lora
        ).train()  # Lightning keeps the mode

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="package:smollm2")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

path = resolve_model(options.model)
tokenizer = AutoTokenizer.from_pretrained(path)
rows = []
for row in recipe_rows("arpabet")["train"][: 8 * options.steps]:
    prompt, answer = encode_row(tokenizer, row)
    rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
loader = torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=DataCollatorForSeq2Seq(tokenizer))

module = Speller(path)
tmkl = TMKLCallback(TMKL(weight=1.0))
trainer = lightning.Trainer(max_epochs=1, log_every_n_steps=1, enable_checkpointing=False, callbacks=[tmkl])
trainer.fit(module, loader)
print({name: round(float(value), 4) for name, value in trainer.logged_metrics.items()})
module.model.save_pretrained("runs/lightning_module")
