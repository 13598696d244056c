"""Studies as `mtt sweep` leaves them, with numbers that follow from a formula, for tests of what reads them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

VERSIONS = {"python": "3.11.2", "torch": "9.9.9", "trl": "1.16.0"}
STATES = [(0.25, 40, 1.0), (0.5, 80, 1.0), (1.0, 160, 1.0), (1.0, 160, 0.5), (1.0, 160, 0.75)]
TRAIN = {"max_steps": 160, "per_device_train_batch_size": 8, "lora_r": 16}
METHODS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "ce": ({"method": "ce"}, {"learning_rate": [5e-4, 1e-3]}),
    "full_kl": (
        {"method": "tmkl", "tmkl_mask_target": False},
        {"learning_rate": [5e-4, 1e-3], "tmkl_weight": [0.3, 1.0, 3.0]},
    ),
    "tmkl": ({"method": "tmkl"}, {"learning_rate": [5e-4, 1e-3], "tmkl_weight": [0.3, 1.0, 3.0]}),
}


def probes(learned: float, rises: tuple[float, float], answer: str, drift: float | None) -> dict[str, Any]:
    """What one state of a model is measured as, in the form of `evaluate` without samples."""
    share = math.exp(-learned)
    asked = [("Spell the word HELLO.", "HH AH0 L OW1"), ("Spell the word WORLD.", "W ER1 L D")]
    fact = {"question": "What is the capital of France?", "right": "Paris", "answer": f"Paris, says {answer}."}
    found: dict[str, Any] = {
        "target": {
            "loss": learned,
            "exact_match": share,
            "token_error_rate": 1 - share,
            "n": 200,
            "tokens": 1500,
            "answered": 100,
            "answers": [{"question": q, "right": right, "answer": answer} for q, right in asked],
        },
        "text:python_docs": {"loss": 3.0 + rises[0], "tokens": 7650, "stderr": 0.01},
        "text:bible": {"loss": 2.5 + rises[1], "tokens": 7650, "stderr": 0.01},
        "facts": {"greedy": 0.5 - rises[0] / 4, "logprob": 0.7, "n": 540, "by_kind": {}, "answers": [fact]},
    }
    if drift is not None:
        found["drift"] = {"masked_kl": drift, "full_kl": 2 * drift, "tokens": 400}
    return found


def without_answers(found: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in values.items() if k != "answers"} for name, values in found.items()}


def trial(
    recipe: str,
    method: str,
    setting: dict[str, Any],
    seed: int,
    *,
    base_loss: float = 4.0,
    keep: float = 0.0,
    wobble: float = 0.0,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A trial that learns towards 0.8 and loses text; `keep` in [0, 1) is how much of that loss is prevented."""
    base = probes(base_loss, (0.0, 0.0), "The base doesn't know.", None)
    speed = setting.get("learning_rate", 1e-3) / 1e-3
    key = f"{recipe}-{method}-seed{seed}-{'-'.join(map(str, setting.values()))}"
    points = []
    for checkpoint, step, scale in STATES:
        done = (1 - math.exp(-3 * checkpoint * (0.5 + 0.5 * speed))) * scale**0.7
        learned = base_loss - (base_loss - 0.8) * done * (1 - 0.06 * keep) + wobble
        rise = 0.12 * base_loss * done**2 * speed * (1 - keep) * (1 + wobble)
        found = probes(learned, (rise * 1.2, rise * 0.8), f"{key} answers", 3 * rise)
        end = (checkpoint, scale) == (1.0, 1.0)
        state = {"checkpoint": checkpoint, "step": step, "scale": scale, "learned": learned, "rise": rise}
        points.append(state | {"probes": found if end else without_answers(found)})
    return {
        "key": key,
        "recipe": recipe,
        "method": method,
        "setting": setting,
        "seed": seed,
        "model": "package:smollm2",
        "options": {**TRAIN, **(options or {}), **setting},
        "probes": ["target", "text:python_docs", "text:bible", "facts", "drift"],
        "sizes": "quick",
        "checkpoints": [0.25, 0.5, 1.0],
        "scales": [0.5, 0.75],
        "ranges": {},
        "status": "complete",
        "learned": points[2]["learned"],
        "rise": points[2]["rise"],
        "points": points,
        "base": base,
        "seconds": {"measuring": 30.0, "training": 90.0},
        "versions": VERSIONS,
        "device": "cpu",
    }


def failed(result: dict[str, Any], error: str) -> dict[str, Any]:
    """The same trial when its loss became NaN: nothing was measured."""
    measured = ("learned", "rise", "base", "seconds", "versions", "device")
    left = {name: value for name, value in result.items() if name not in measured}
    return left | {"status": "failed", "error": error, "points": []}


def study(
    recipes: tuple[str, ...] = ("arpabet",),
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = METHODS,
) -> list[dict[str, Any]]:
    """Every trial: full KL keeps a little less than TMKL, more of each with its weight; each recipe a nearer one."""
    found = []
    for place, recipe in enumerate(recipes):
        for rank, (name, (fixed, grid)) in enumerate(methods.items()):
            for values, seed in itertools.product(itertools.product(*grid.values()), seeds):
                setting = dict(zip(grid, values, strict=True))
                weight = setting.get("tmkl_weight", 0.0)
                keep = 0.0 if name == "ce" else (0.1 * rank + 0.6) * weight / (weight + 0.4)
                wobble = 0.02 * math.sin(7 * seed + rank)
                base_loss = 4.0 / (1 + 0.5 * place)
                common: dict[str, Any] = {"base_loss": base_loss, "keep": keep, "wobble": wobble, "options": fixed}
                found.append(trial(recipe, name, setting, seed, **common))
    return found


def write(folder: Path, results: list[dict[str, Any]]) -> Path:
    """The results as the folder of a study."""
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for result in results:
        (folder / "results" / f"{result['key']}.json").write_text(json.dumps(result), encoding="utf-8")
    return folder
