"""On real weights: SmolLM2-135M-Instruct from its package."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mask_the_target import TMKLCallback, attach
from mask_the_target.base import adapters_off

pytestmark = pytest.mark.slow

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def _batch(rows: int = 2, length: int = 48) -> dict[str, torch.Tensor]:
    ids = torch.randint(20, 40000, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_the_kl_is_zero_before_training_for_the_true_base_only(
    smollm2: Callable[[], PreTrainedModel], init: bool | str
) -> None:
    original, data = smollm2(), _batch()
    config = LoraConfig(**LORA, init_lora_weights=init, layers_to_transform=[0, 1, 2, 3])  # SVDs take a while
    model = get_peft_model(smollm2(), config).train()
    with attach(model, full_kl=True) as attachment:
        assert attachment.base.kind == ("off" if init is True else "initial")
        model(**data)
        assert abs(float(attachment.last.kl)) <= 1e-6
        assert abs(float(attachment.last.full_kl)) <= 1e-6
    with attach(model, base=original, full_kl=True) as attachment:  # the original, loaded separately
        model(**data)
        assert abs(float(attachment.last.kl)) <= 1e-6
    with torch.no_grad(), adapters_off(model):
        off = model.eval()(**data).logits
    apart = float((off - original.eval()(**data).logits.detach()).abs().max())
    assert apart == 0 if init is True else apart > 1  # the trap: off is far from the base


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_real_trainers_train_log_and_save(smollm2: Callable[[], PreTrainedModel], tmp_path: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    words = ["gradient", "lantern", "harbour", "sceptre"] * 3
    answers = ["G R EY D", "L AE N T", "HH AA R B", "S EH P T"] * 3
    if kind == "SFTTrainer":
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Spell {word}."}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for word, answer in zip(words, answers, strict=True)
        ]
        trainer = SFTTrainer(
            smollm2(),
            SFTConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            callbacks=[TMKLCallback()],
        )
    else:
        encoded = [tokenizer(f"{word} is {answer}") for word, answer in zip(words, answers, strict=True)]
        trainer = Trainer(
            get_peft_model(smollm2(), LoraConfig(**LORA)),
            TrainingArguments(**settings),
            train_dataset=[{**row, "labels": row["input_ids"]} for row in encoded],
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[TMKLCallback()],
        )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-3)
    assert logs[0]["kl"] == 0
    assert logs[2]["kl"] > 1e-3
    assert logs[2]["ce"] < logs[0]["ce"]

    trainer.save_model(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(smollm2(), str(tmp_path / "adapter")).eval()
    inputs = {k: v for k, v in _batch().items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, trainer.model.eval()(**inputs).logits)
