"""`mtt train --adapter NAME`: each adapter of the paper from its settings to the saved folder, on a toy Llama."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from front.test_train import Grab, config, logits, make_model, one_thread, weights  # noqa: F401
from mask_the_target.cli import check_adapter, main
from mask_the_target.front import train
from mask_the_target.front.adapters import ADAPTERS, AdaLoraSteps, adalora_schedule, make_adapter
from mask_the_target.front.options import parse


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def argv(config: Path, name: str, *more: str) -> list[str]:  # noqa: F811
    return [str(config), "--adapter", name, *more]


class StopAfter(TrainerCallback):
    """Ctrl-C in step `steps`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps - 1:
            signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------------------ settings


def test_the_papers_settings() -> None:
    for name in ("lora", "rslora", "dora", "pissa", "sinelora"):
        made: Any = make_adapter(name)
        assert (made.r, made.lora_alpha, made.lora_dropout, made.target_modules) == (64, 128, 0.05, "all-linear")
        assert (made.use_rslora, made.use_dora) == (name == "rslora", name == "dora")
        assert made.init_lora_weights == ("pissa" if name == "pissa" else True)
    assert made.peft_type == "SINELORA"
    ada: Any = make_adapter("adalora")
    assert (ada.init_r, ada.target_r, ada.lora_alpha, ada.lora_dropout) == (96, 64, 128, 0.05)
    assert (ada.beta1, ada.beta2, ada.tinit, ada.tfinal, ada.total_step) == (0.85, 0.85, 200, 1000, 2000)
    vera: Any = make_adapter("vera")
    assert (vera.r, vera.vera_dropout) == (256, 0.05)
    rand: Any = make_adapter("randlora")
    assert (rand.r, rand.randlora_alpha, rand.randlora_dropout) == (8, 16, 0.05)  # scaled by 2, as alpha / r is


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 120, 1200, 1201, 2000, 50_000])
def test_adaloras_schedule_leaves_time_to_prune(steps: int) -> None:
    schedule = adalora_schedule(steps)
    assert schedule["tinit"] <= 200
    assert schedule["tfinal"] <= 1000
    AdaLoraConfig(**schedule)  # PEFT raises where there is no step to prune in
    pruning = steps - schedule["tinit"] - schedule["tfinal"]
    assert pruning >= 0.4 * steps


def test_explicit_options_win_and_the_rest_is_the_papers(config: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = parse([str(config)]).model
    assert (plain.lora_r, plain.lora_alpha, plain.lora_dropout) == (4, 32, 0.0)  # TRL's, and the file's
    chosen = parse(argv(config, "lora")).model  # the file gives lora_r: 4 and lora_dropout: 0
    assert (chosen.lora_r, chosen.lora_alpha, chosen.lora_dropout) == (4, 8, 0.0)
    chosen = parse(argv(config, "lora", "--lora_r=16", "--lora-alpha", "3", "--lora_dropout", "0.1")).model
    assert (chosen.lora_r, chosen.lora_alpha, chosen.lora_dropout) == (16, 3, 0.1)
    lines = [line for line in config.read_text().splitlines() if not line.startswith("lora_")]
    (tmp_path / "bare.yaml").write_text("\n".join([*lines, "adapter: dora"]))
    chosen = parse([str(tmp_path / "bare.yaml")]).model
    assert (chosen.lora_r, chosen.lora_alpha, chosen.lora_dropout) == (64, 128, 0.05)
    assert chosen.lora_target_modules == "all-linear"
    plain = parse([str(tmp_path / "bare.yaml"), "--adapter", "lora", "--lora_target_modules", "q_proj", "v_proj"]).model
    assert plain.lora_target_modules == ["q_proj", "v_proj"]


def test_what_is_refused_before_anything_is_loaded(config: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    def refused(name: str, *more: str) -> str:
        assert main(["train", *argv(config, name, "--model_name_or_path", "./nowhere", *more)]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "Unknown adapter 'ada-lora'. Did you mean 'adalora'?" in refused("ada-lora")
    assert "Known: lora, rslora, dora, pissa, adalora, vera, randlora, sinelora." in refused("xyz")
    assert "Remove use_dora, or set adapter: dora." in refused("pissa", "--use_dora", "true")
    assert "Remove use_rslora." in refused("rslora", "--use_rslora", "true")
    assert "full fine-tune" in refused("lora", "--use_peft", "false")
    assert "VeRA has no alpha" in refused("vera", "--lora_alpha", "8")
    assert "not single parameters" in refused("randlora", "--lora_target_parameters", "a.b")
    assert "must not be quantised" in refused("pissa", "--load_in_4bit", "true")
    assert "upload the output folder" in refused("pissa", "--push_to_hub", "true")
    assert "Use bf16" in refused("adalora", "--fp16", "true", "--bf16", "false")
    assert "Leave base at auto" in refused("pissa", "--base", "off")


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_trains_with_tmkl_and_loads_with_the_same_logits(
    config: Path,  # noqa: F811
    model: Path,
    tmp_path: Path,
    name: str,
) -> None:
    grab = Grab()
    rate = "0.1" if name == "adalora" else "0.01"  # its E starts at zero, so at first little moves
    options = argv(config, name, "--max_steps", "4", "--learning_rate", rate, "--tmkl_weight", "1")
    record = train.run(parse(options), [grab])
    steps = [entry for entry in record["log_history"] if "kl" in entry]
    assert len(steps) == 4
    assert abs(steps[0]["kl"]) < 1e-5  # each starts as the base
    assert steps[-1]["kl"] > 0
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], abs=2e-4)  # weight 1

    base = AutoModelForCausalLM.from_pretrained(model)
    before = logits(base)
    after = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    torch.testing.assert_close(after, grab.logits, rtol=0, atol=2e-6)
    assert (after - before).abs().max() > 1e-4

    check_adapter(tmp_path / "out", AutoConfig.from_pretrained(model))  # mtt eval takes it
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert written["adapter"] == name
    settings = written["adapter_settings"]
    ranks = {"vera": 16, "randlora": 1}
    assert settings["target_r" if name == "adalora" else "r"] == ranks.get(name, 4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {name} adapter for" in card
    assert f"Adapter: {name}, peft_type" in card
    assert ("import mask_the_target.sine_lora" in card) == (name == "sinelora")


def test_a_run_goes_on_with_the_same_adapter_only(config: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with pytest.raises(train.Interrupted):
        train.run(parse(argv(config, "dora")), [StopAfter(2)])
    assert main(["train", *argv(config, "lora", "--resume_from_checkpoint", "last")]) == 2
    assert "adapter was 'dora' and is now 'lora'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "stop"), [("pissa", 3), ("adalora", 2), ("adalora", 4), ("randlora", 3)])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(config: Path, tmp_path: Path, name: str, stop: int) -> None:  # noqa: F811
    """AdaLoRA's 6 steps: pruned in each of the first 3; stopped while pruning, and after it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.run(parse(argv(config, name, "--output_dir", str(whole))))
    with pytest.raises(train.Interrupted):
        train.run(parse(argv(config, name, "--output_dir", str(cut))), [StopAfter(stop)])
    train.run(parse(argv(config, name, "--output_dir", str(cut), "--resume_from_checkpoint", "last")))
    expected, found = weights(whole), weights(cut)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (cut, whole))
    assert ours == theirs


def test_pissa_is_saved_as_lora_of_twice_the_rank(config: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    train.run(parse(argv(config, "pissa", "--max_steps", "2")))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["init_lora_weights"], saved["r"], saved["lora_alpha"]) == (True, 8, 16)
    # The update alone, in float64: small beside the singular triplets that A and B started from.
    tensors = weights(tmp_path / "out")
    a = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].double()
    b = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].double()
    start = a[4:]  # of the base's own weight: W = U S V, A0 = sqrt(S / s) V
    weight = AutoModelForCausalLM.from_pretrained(model).model.layers[0].self_attn.q_proj.weight.detach().double()
    values = torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(2 * start @ start.T, values.diag(), rtol=0, atol=1e-6)
    assert 0 < torch.linalg.matrix_norm(2 * b @ a) < 0.5 * values.norm()


def test_pissa_of_too_high_a_rank_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["train", *argv(config, "pissa", "--lora_r", "20")]) == 2
    assert "top 20 singular triplets" in (error := capsys.readouterr().err)
    assert "has only 16. Lower lora_r" in error


def test_randlora_trains_eight_bases(config: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    """PEFT has 16 bases of rank 1 for these widths; the update has rank 8."""
    train.run(parse(argv(config, "randlora")))
    lambdas = {key: tensor for key, tensor in weights(tmp_path / "out").items() if "lambda" in key}
    assert len(lambdas) == 14
    for tensor in lambdas.values():
        assert tensor.shape == (1, 16)
        assert tensor[:, :8].abs().min() > 0
        assert not tensor[:, 8:].any()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
    layer: Any = loaded.base_model.model.model.layers[0].mlp.down_proj
    values = torch.linalg.svdvals(layer.get_delta_weight("default").double())
    assert values[7] > 1e-3 * values[0]
    assert values[8] < 1e-6 * values[0]


def test_adalora_prunes_to_the_target(config: Path, tmp_path: Path) -> None:  # noqa: F811
    record = train.run(parse(argv(config, "adalora")))
    settings = record["adapter_settings"]
    assert (settings["total_step"], settings["tinit"], settings["tfinal"]) == (6, 0, 3)
    assert (settings["init_r"], settings["target_r"]) == (6, 4)
    ranks = [len(tensor) for key, tensor in weights(tmp_path / "out").items() if "lora_E" in key]
    assert len(ranks) == 14
    assert sum(ranks) == 4 * 14  # of 6 * 14
    assert len(set(ranks)) > 1  # by importance, not evenly
    checkpoint = weights(tmp_path / "out" / "checkpoint-6")
    values = torch.cat([tensor for key, tensor in checkpoint.items() if "lora_E" in key])
    assert len(values) == 6 * 14
    assert int(values.count_nonzero()) == 4 * 14
    assert load_file(tmp_path / "out" / "checkpoint-2" / "adalora.safetensors")
    (tmp_path / "out" / "checkpoint-6" / "adalora.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-6 has no adalora\.safetensors"):
        train.run(parse(argv(config, "adalora", "--resume_from_checkpoint", "last", "--max_steps", "8")))


def test_adaloras_penalty_has_the_gradient_that_peft_would_give(model: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    options |= adalora_schedule(100)
    made = [
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), AdaLoraConfig(orth_reg_weight=weight, **options))
        for weight in (0.5, 0.0)
    ]
    made[1].load_state_dict(made[0].state_dict())
    ids = torch.arange(2, 18)[None]
    for one in made:
        one(input_ids=ids, labels=ids).loss.backward()
    AdaLoraSteps().on_pre_optimizer_step(None, None, None, model=made[1])
    for p, q in zip(made[0].parameters(), made[1].parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7)


def test_eval_knows_sinelora_without_being_told(config: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    train.run(parse(argv(config, "sinelora", "--max_steps", "1")))
    folder = tmp_path / "out"
    code = (
        "from pathlib import Path; from transformers import AutoConfig; from mask_the_target.cli import check_adapter;"
        "from mask_the_target.front.backbones import load_model;"
        f"check_adapter(Path({str(folder)!r}), AutoConfig.from_pretrained({str(model)!r}));"
        f"model, _ = load_model({str(model)!r}, Path({str(folder)!r})); print(type(model.base_model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "SineLoraModel\n", done.stderr
