"""Toy models with real architectures, and the real one where its package is installed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # it would report each run to a server, and wait for it
if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core; two threads in each would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

# The same examples in every run, so that a change is what turns a test red. New ones: --hypothesis-profile=explore
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile("repeatable")

TARGETS = ["q_proj", "v_proj", "down_proj"]
# Of a toy of any decoder family. Weights large enough that logits differ clearly.
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def toy_llama(seed: int = 0, **config: object) -> LlamaForCausalLM:
    """Two layers, 48 tokens; float32."""
    settings = SIZES | {"max_position_embeddings": 128}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).train()


def with_lora(model: PreTrainedModel, *, moved: float = 0.0, **config: object) -> PeftModel:
    """LoRA on ``model``; ``moved`` adds noise of that size to the adapter, as if it had been trained."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(model, LoraConfig(**(settings | config)))
    if moved:
        move(peft_model, moved)
    return peft_model.train()


def move(model: torch.nn.Module, size: float, seed: int = 1) -> None:
    """Add noise to every trainable weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def batch(rows: int = 3, length: int = 10, seed: int = 0, vocabulary: int = 48) -> dict[str, torch.Tensor]:
    """Token ids, a right-padded attention mask and labels with an ignored prompt of uneven length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row] = -100
        if row:
            mask[row, -row:] = 0
            labels[row, -row:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """The same seed for each test, and none of accelerate's process-wide settings (mixed precision) from the last."""
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # older trainers set it and leave it


@pytest.fixture(scope="session")
def smollm2() -> Callable[[], PreTrainedModel]:
    """A maker of fresh SmolLM2-135M-Instruct models in float32, with ``.path``; skips where the package is missing."""
    from transformers import AutoModelForCausalLM

    from mask_the_target.front.backbones import resolve_model

    path = resolve_model("package:smollm2")

    def make() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    make.path = path
    return make
