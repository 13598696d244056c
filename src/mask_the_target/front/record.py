"""What a run leaves beside its weights: run.json and the model card."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mask_the_target.anchors import written_by_a_model
from mask_the_target.files import write_whole
from mask_the_target.front.backbones import PREFIX
from mask_the_target.front.rivals import RIVALS, strength_of

if TYPE_CHECKING:
    from mask_the_target.front.data import Data
    from mask_the_target.front.options import Settings

BEYOND = ("anchors", "anchor_share", "max_drift")  # of the objective too; the paper has none of them
PACKAGES = ("mask-the-target", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "lm-eval")


def write_json(path: Path, value: Any) -> None:
    """`write_whole` as indented JSON; what JSON doesn't know (a path, an enum) becomes a string."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def versions() -> dict[str, str]:
    """Installed versions of what a run's numbers depend on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "mask-the-target":
                found[package] = "not installed (run from source)"
    return found


def _method(arguments: Any) -> dict[str, Any]:
    """The objective alone: where hidden states are kept doesn't change it, so a run may go on with or without."""
    base = "auto" if arguments.base == "cached" else arguments.base
    if arguments.method == "tmkl":
        fields = {
            name: value for name, value in asdict(arguments).items() if name.startswith("tmkl_") or name in BEYOND
        }
        if arguments.anchors == "none":
            del fields["anchor_share"]
        elif arguments.anchors != "auto":
            of = "written by a model" if written_by_a_model(Path(arguments.anchors)) else "data, so this is replay"
            fields["anchors"] = f"{arguments.anchors} ({of})"
        return {"method": "tmkl", **fields, "base": base}
    rival = RIVALS.get(arguments.method)
    found: dict[str, Any] = {"method": arguments.method}
    if rival is not None and rival.strength is not None:
        found["rival_weight"] = strength_of(arguments.method, arguments.rival_weight)
    return found | ({"base": base} if rival is not None and rival.uses_base else {})


def new_record(settings: Settings, data: Data) -> dict[str, Any]:
    """run.json before the first step. `seconds` counts the training time of all parts of a resumed run."""
    training, model, method = settings.training, settings.model, settings.tmkl
    return {
        "status": "running",
        "model": model.model_name_or_path,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "split": settings.script.dataset_train_split},
        "method": _method(method),
        "seed": training.seed,
        "adapter": method.adapter,  # None: TRL's LoRA options
        "lora": {key: value for key, value in asdict(model).items() if key.startswith(("lora_", "use_"))},
        "options": {
            "training": training.to_dict(),  # hides tokens
            "model": asdict(model),
            "data": asdict(settings.script),
        },
        "versions": versions(),
        "device": str(training.device),
        "seconds": 0.0,
        "supervision": {},
        "adapter_settings": {},
        "metrics": {},
        "log_history": [],
    }


FIGURES = (
    *("loss", "ce", "kl", "full_kl", "context_kl", "context_weight", "held_out_kl", "held_out_full_kl"),
    *("penalty", "blocked", "eval_loss", "train_runtime"),
)


def last_figures(log_history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last value of each of the main figures that a trainer logged."""
    found: dict[str, float] = {}
    for entry in log_history:
        found |= {k: v for k, v in entry.items() if k in FIGURES}
    return found


PAPER = "*Mask the Target: A Plug-and-Play Regularizer Against LoRA Forgetting*"
LINK = "[arXiv 2605.29498](https://arxiv.org/abs/2605.29498)"
CARD = """\
---
library_name: peft
pipeline_tag: text-generation
tags: [lora, peft, trl, tmkl]
{hub}---

# {title} for `{base}`, trained with {name}

- Base model: `{base}`
- Data: `{data[name]}` ({data[fingerprint]}), split {data[split]}
- Method: {method}
- {adapter}
- Steps: {steps}, seed {seed}{figures}
- Versions: {versions}

All options are in `run.json`.

## What was learned and kept

{measured}

## Use

{needs}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
{load}
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

{source}
"""
NOT_MEASURED = (
    "Not measured here. `mtt eval --model BASE --adapter THIS_FOLDER` measures what was learned and what was kept, "
    "base and adapted in one load."
)


def model_card(record: Mapping[str, Any], measured: str = "") -> str:
    """README.md of an adapter. `measured`: a Markdown table of what was learned and kept, where that is known."""
    base = str(record["model"])
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    load = f"\nbase = AutoModelForCausalLM.from_pretrained({base!r})"
    if base.startswith(PREFIX):
        load = (
            "from mask_the_target.front.backbones import resolve_model\n\n"
            f"base = AutoModelForCausalLM.from_pretrained(resolve_model({base!r}))"
        )
    if record.get("adapter") == "sinelora":
        load = "import mask_the_target.sine_lora\n" + load
    method = dict(record["method"])
    kind = method.pop("method")
    if kind == "tmkl":
        name, source = "target-masked KL (TMKL)", f"Method: Xu, Garg, Saratchandran, Lucey, {PAPER}, {LINK}."
    elif (rival := RIVALS.get(kind)) is not None:
        name, source = rival.title, f"Method: {rival.source}; a rival of TMKL, {PAPER}, {LINK}."
        if rival.strength is not None:
            method = {f"rival_weight ({rival.strength})": method.pop("rival_weight"), **method}
    else:
        name, source = "plain cross-entropy", f"The plain baseline of {PAPER}, {LINK}."
    options = _listed(
        (key.removeprefix("tmkl_"), value) for key, value in method.items() if value not in (None, "none")
    )
    figures = _listed((key, f"{value:.4g}") for key, value in record["metrics"].items() if key != "train_runtime")
    return CARD.format(
        hub=f"base_model: {base}\n" if on_hub else "",
        base=base,
        name=name,
        data=record["data"],
        method=name + (f" with {options}" if options else ""),
        **_adapter_lines(record),
        steps=record["steps"],
        seed=record["seed"],
        figures=f"; last logged: {figures}" if figures else "",
        versions=_listed(record["versions"].items()),
        measured=measured or NOT_MEASURED,
        load=load,
        source=source,
    )


def _adapter_lines(record: Mapping[str, Any]) -> dict[str, str]:
    name, lora = record.get("adapter"), record["lora"]
    needs = "A plain PEFT adapter; nothing else is needed to load it:"
    if name is None:
        values = {key: lora[f"lora_{key}"] for key in ("alpha", "dropout")}
        settings = f"rank {lora['lora_r']}, {_listed(values.items())}, modules {lora['lora_target_modules']}"
        return {"title": "LoRA adapter", "adapter": f"LoRA: {settings}", "needs": needs}
    if name == "sinelora":
        needs = "SineLoRA is not in PEFT; the import of `mask_the_target.sine_lora` makes it known:"
    if name == "pissa":
        needs = "Saved as plain LoRA of twice the rank, which fits the base as it is; nothing else is needed:"
    adapter = f"Adapter: {name}, {_listed(record['adapter_settings'].items())}"
    return {"title": f"{name} adapter", "adapter": adapter, "needs": needs}


def _listed(pairs: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{key} {value}" for key, value in pairs)
