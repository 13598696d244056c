"""torchtune's own recipe under the example file, with a toy model in place of the config's."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchtune")

import torch
import torchtune
from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transformers import AutoModelForCausalLM

from frameworks.script import check, run_script
from frameworks.toy import DATA, write_toy
from mask_the_target import TMKL

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchtune_lora.py"
CONFIG = Path(torchtune.__file__).parents[1] / "recipes/configs/llama3_2/1B_lora_single_device.yaml"


def _config(tmp_path: Path, overrides: dict[str, Any]) -> Path:
    """torchtune's config for Llama 3.2 1B with a toy of that family; nothing of the loss, nor of the recipe's shape."""
    toy = write_toy(tmp_path / "toy")
    if not overrides.get("model", {}).get("tie_word_embeddings", True):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_pretrained(toy, tie_word_embeddings=False).save_pretrained(toy)
    vocabulary = json.loads((toy / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (toy / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (toy / "merges.txt").write_text("", encoding="utf-8")
    sizes = json.loads((toy / "config.json").read_text(encoding="utf-8"))
    cfg = OmegaConf.load(CONFIG)
    settings = {
        "output_dir": str(tmp_path / "out"),
        "model": {
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "vocab_size": sizes["vocab_size"],
            "num_layers": sizes["num_hidden_layers"],
            "num_heads": sizes["num_attention_heads"],
            "num_kv_heads": sizes["num_key_value_heads"],
            "embed_dim": sizes["hidden_size"],
            "intermediate_dim": sizes["intermediate_size"],
            "max_seq_len": sizes["max_position_embeddings"],
            "norm_eps": sizes["rms_norm_eps"],
            "rope_base": 10_000,
            "scale_factor": 1,
            "lora_rank": 4,
            "lora_alpha": 8,
        },
        "tokenizer": {
            "_component_": "torchtune.models.qwen2.qwen2_tokenizer",
            "path": str(toy / "vocab.json"),
            "merges_file": str(toy / "merges.txt"),
            "special_tokens_path": str(toy / "tokenizer.json"),
            "max_seq_len": 256,
        },
        "checkpointer": {"checkpoint_dir": str(toy)},
        "dataset": {
            "_component_": "torchtune.datasets.chat_dataset",
            "source": "json",
            "data_files": str(DATA),
            "split": "train",
            "conversation_column": "messages",
            "conversation_style": "openai",
        },
        "optimizer": {"lr": 0.02},
        "lr_scheduler": {"num_warmup_steps": 0},
        "seed": 0,
        "shuffle": False,
        "max_steps_per_epoch": 3,
        "gradient_accumulation_steps": 1,
        "device": "cpu",
        "dtype": "fp32",
    }
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.merge(cfg, settings, overrides), path)
    return path


def _documents(cfg: DictConfig) -> list[list[dict[str, torch.Tensor]]]:
    """Of each step, the conversations that the recipe collates, or finds packed: each as a row of its own."""
    data, rows = config.instantiate(cfg.dataset, config.instantiate(cfg.tokenizer)), iter(range(1000))
    steps = []
    for _ in range(cfg.max_steps_per_epoch):
        steps.append([])
        for _ in range(cfg.batch_size * cfg.gradient_accumulation_steps):
            row = data[next(rows)]
            lengths = row["seq_lens"].tolist() if cfg.dataset.packed else [len(row["tokens"])]
            tokens, labels = (torch.as_tensor(row[name]).split(lengths) for name in ("tokens", "labels"))
            steps[-1] += [{"input_ids": t[None], "labels": y[None]} for t, y in zip(tokens, labels, strict=True)]
    return steps


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "enable_activation_checkpointing": True},
        {"dataset": {"packed": True}, "batch_size": 2},
        {"model": {"tie_word_embeddings": False, "use_dora": True}},
    ],
    ids=["example", "accumulation", "packing", "untied-dora"],
)
def test_the_example_trains_on_the_reference_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    path = _config(tmp_path, settings)
    weight = 0.5 if "gradient_accumulation_steps" in settings else 1.0
    steps = run_script(monkeypatch, EXAMPLE, "--config", str(path), f"tmkl_weight={weight}")
    cfg = OmegaConf.load(path)
    log = next((tmp_path / "out" / "logs").glob("log_*.txt")).read_text(encoding="utf-8")
    logs = [
        {name: float(value) for name, value in re.findall(r"(\w+):(\S+)", line)}
        for line in log.splitlines()
        if line.startswith("Step")
    ]
    adapted = config.instantiate(cfg.model)
    adapted.load_state_dict(config.instantiate(cfg.checkpointer).load_checkpoint()["model"], strict=False)
    set_trainable_params(adapted, get_adapter_params(adapted))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "toy", dtype=torch.float32)
    check(logs, steps, _documents(cfg), adapted, base, TMKL(weight=weight), by_tokens=True)
    assert (tmp_path / "out" / "epoch_0" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tmkl_weight": 1.0, "model": {"apply_lora_to_output": True}}, "apply_lora_to_output adapts the head"),
        ({"tmkl_weight": 1.0, "epochs": 2}, "on a CPU: there, saving after an epoch merges the adapter into the model"),
        ({"tmkl_weight": -1.0}, "weight=-1.0 is not possible; it must be >= 0"),
        ({"tmkl_wieght": 1.0}, "tmkl_weight"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    path = _config(tmp_path, settings | {"checkpointer": {"checkpoint_dir": str(tmp_path / "none")}})
    with pytest.raises((ValueError, AttributeError), match=re.escape(message)):
        run_script(monkeypatch, EXAMPLE, "--config", str(path))


def test_a_head_that_is_adapted_itself_is_refused() -> None:
    sizes = {"vocab_size": 9, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "embed_dim": 4, "max_seq_len": 8}
    model = lora_llama3(["q_proj"], apply_lora_to_output=True, lora_rank=1, lora_alpha=1, **sizes)
    with pytest.raises(ValueError, match="TransformerDecoder with LoRALinear as its head: this loss takes"):
        runpy.run_path(str(EXAMPLE))["plain_head"](model)
