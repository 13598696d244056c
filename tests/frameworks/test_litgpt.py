"""The example in the shape of litgpt's recipe, on litgpt's own model, data and loader."""

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litgpt")

import torch
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.lora import GPT as LoRAGPT
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import mark_only_lora_as_trainable, merge_lora_weights
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.scripts.merge_lora import merge_lora
from litgpt.tokenizer import Tokenizer
from litgpt.utils import CycleIterator, save_config
from safetensors.torch import load_file

from frameworks.script import WithLogits, check, run_script
from frameworks.toy import DATA, write_toy
from mask_the_target import TMKL

EXAMPLE = Path(__file__).parents[2] / "examples" / "litgpt_lora.py"
LORA = {"lora_r": 4, "lora_alpha": 16, "lora_query": True, "lora_value": True}


def _write_toy(folder: Path, **settings: Any) -> Path:
    """The toy as `litgpt convert_to_litgpt` leaves a model that it knows by name, with the example data beside it."""
    sizes = json.loads((write_toy(folder) / "config.json").read_text(encoding="utf-8"))
    config = Config(
        name="toy",
        block_size=sizes["max_position_embeddings"],
        vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        n_query_groups=sizes["num_key_value_heads"],
        n_embd=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        norm_eps=sizes["rms_norm_eps"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        **settings,
    )
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(folder / "model.safetensors"))
    if config.lm_head_bias:
        weights["lm_head.bias"] = torch.randn(config.padded_vocab_size, generator=torch.Generator().manual_seed(0))
    torch.save(weights, folder / "lit_model.pth")
    save_config(config, folder)
    talks = [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    rows = [{"instruction": asked["content"], "output": answer["content"]} for asked, answer in talks]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def _arguments(toy: Path, out: Path, *more: str) -> list[str]:
    given = {
        "out_dir": out,
        "precision": "32-true",
        "lora_r": 4,
        "lora_dropout": 0.0,
        "data": "JSON",
        "data.json_path": toy / "data.json",
        "data.val_split_fraction": 0.1,
        "data.num_workers": 0,
        "train.max_steps": 4,
        "train.lr_warmup_steps": 1,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4,
        "optimizer": '{"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}}',
    }
    return [str(toy), *(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


def _load(kind: type[GPT], config: Config, file: Path) -> GPT:
    model = kind(config)
    model.load_state_dict(torch.load(file, weights_only=True), strict=kind is GPT)
    return model


@pytest.mark.parametrize(
    ("settings", "more", "weight"),
    [
        ({}, [], 1.0),
        (
            {"final_logit_softcapping": 3.0, "lm_head_bias": True},
            ["--tmkl_weight", "0.5", "--train.micro_batch_size", "2", "--data.mask_prompt", "true"],
            0.5,
        ),
    ],
    ids=["example", "softcap-bias-accumulation"],
)
def test_the_example_trains_on_the_reference_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], more: list[str], weight: float
) -> None:
    toy, out = _write_toy(tmp_path / "toy", **settings), tmp_path / "out"
    steps = run_script(monkeypatch, EXAMPLE, *_arguments(toy, out, *more))
    with next(out.glob("logs/csv/*/metrics.csv")).open(encoding="utf-8") as file:
        logs = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    size = 2 if more else 4
    data = JSON(toy / "data.json", val_split_fraction=0.1, num_workers=0, mask_prompt=bool(more))
    data.connect(tokenizer=Tokenizer(toy), batch_size=size)
    data.setup()
    loader = CycleIterator(data.train_dataloader())
    batches = [[next(loader) for _ in range(4 // size)] for _ in range(4)]
    inputs = [[{name: part[name] for name in ("input_ids", "labels")} for part in parts] for parts in batches]

    weights = toy / "lit_model.pth"
    adapted = _load(LoRAGPT, LoRAConfig.from_file(toy / "model_config.yaml", **LORA), weights)
    mark_only_lora_as_trainable(adapted)
    base = _load(GPT, Config.from_file(toy / "model_config.yaml"), weights)
    check(logs, steps, inputs, adapted, WithLogits(base), TMKL(weight=weight), by_tokens=False)

    merge_lora(out / "final")  # what was saved is a checkpoint to litgpt
    _load(GPT, base.config, out / "final" / "lit_model.pth")


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    config = LoRAConfig.from_file(_write_toy(tmp_path / "toy") / "model_config.yaml", **LORA)
    model, adapter_off = LoRAGPT(config), runpy.run_path(str(EXAMPLE))["adapter_off"]
    ranks = [module.r for module in model.modules() if hasattr(module, "merged")]
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert ranks == [module.r for module in model.modules() if hasattr(module, "merged")]
    merge_lora_weights(model)
    with pytest.raises(ValueError, match="LoRA is merged into the model's weights"), adapter_off(model):
        pass
