"""The example in Unsloth: on its CPU backend, or with its own kernels where there is a GPU."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("unsloth")  # it patches what is imported after it

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig
from unsloth import FastLanguageModel

from frameworks.toy import Recorder, write_toy
from mask_the_target import TMKL

EXAMPLE = Path(__file__).parents[2] / "examples" / "unsloth_sft.py"


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """The example with a toy model in float32, and ``settings`` of its trainer."""
    load, config = FastLanguageModel.from_pretrained, SFTConfig.__init__

    def with_settings(self: SFTConfig, *arguments: Any, **kwargs: Any) -> None:
        config(self, *arguments, **kwargs | {"report_to": "none", "bf16": False} | settings)

    monkeypatch.setattr(SFTConfig, "__init__", with_settings)
    monkeypatch.setattr(
        FastLanguageModel, "from_pretrained", lambda *args, **kwargs: load(*args, dtype=torch.float32, **kwargs)
    )
    monkeypatch.chdir(tmp_path)  # where it writes what it compiles
    toy, output = write_toy(tmp_path / "toy"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--model", str(toy), "--steps", "4", "--output", str(output)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"padding_free": True},
        {"packing": True, "max_length": 128},
    ],
    ids=["example", "accumulation", "padding-free", "packing"],
)
def test_the_example_trains_on_the_reference_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    recorder = Recorder(monkeypatch)
    _run(tmp_path, monkeypatch, **settings)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    # What is saved is a plain adapter. A copy of the model would call the original's forward, which Unsloth has bound.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "toy", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "out", is_trainable=True)
    trained = dict(recorder.trainer.model.named_parameters())
    for name, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, trained[name]), name
    recorder.check(tmp_path / "toy", TMKL(weight=1.0), steps=4, accumulation=accumulation, adapted=adapted)
