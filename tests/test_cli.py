"""The command as a user meets it: help, exit codes, `mtt eval`, and what a wrong adapter is answered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from front.test_train import make_model, make_rows, write_rows
from mask_the_target.cli import check_adapter, held_out_rows, main


def mtt(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mask_the_target.cli", *args], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    peft.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_help_loads_no_trainer() -> None:
    code = "import sys, mask_the_target.cli as c; c.main(['--help']); print({'trl', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mtt train CONFIG.yaml" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_import_loads_nothing_that_takes_seconds_and_the_names_are_all_there() -> None:
    heavy = "{'peft', 'accelerate', 'trl', 'datasets', 'scipy', 'matplotlib', 'optuna', 'torch._dynamo'}"
    code = f"""import sys, torch, transformers
before = set(sys.modules)
import mask_the_target
print({heavy} & (set(sys.modules) - before), 'transformers.trainer_callback' in sys.modules)
print(all(hasattr(mask_the_target, name) for name in mask_the_target.__all__), mask_the_target.TMKLCallback)
print(hasattr(mask_the_target, "TMKL_Callback"))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name = "<class 'mask_the_target.integrations.transformers.TMKLCallback'>"
    assert done.stdout == f"set() False\nTrue {name}\nFalse\n"


def test_exit_codes() -> None:
    missing = mtt("train", "nothing.yaml")
    assert missing.returncode == 2
    assert missing.stderr == "mtt train: There is no config file 'nothing.yaml'.\n"


@pytest.mark.parametrize(
    ("package", "command"),
    [("trl", "sweep STUDY --dry-run"), ("datasets", "suggest --data DATA"), ("trl", "train CONFIG")],
)
def test_a_missing_package_is_named_with_its_extra(package: str, command: str) -> None:
    examples = Path(__file__).parents[1] / "examples"
    files = {"STUDY": "study.yaml", "DATA": "data/opposites.jsonl", "CONFIG": "sft.yaml"}
    words = [str(examples / files[word]) if word in files else word for word in command.split()]
    code = f"import sys; sys.modules[{package!r}] = None; from mask_the_target.cli import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    extra = "train" if words[0] == "train" else "front"
    assert re.fullmatch(rf"mtt {words[0]}: .*{package}.*pip install 'mask-the-target\[{extra}\]'", last)


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    commands = "train, cache, anchors, eval, demo, sweep, suggest, report, llamafactory, diagnostic"
    assert capsys.readouterr().err == f"mtt: unknown command 'trian'; commands are: {commands}.\n"
    assert main([]) == 2
    assert main(["--version"]) == 0
    with pytest.raises(SystemExit) as left:
        main(["demo", "--steps", "many"])
    assert left.value.code == 2
    assert "--steps: invalid int value: 'many'" in capsys.readouterr().err
    assert main(["demo", "--steps", "0"]) == 2
    assert "--steps is 0; it must be at least 1" in capsys.readouterr().err


def test_train_help_lists_trl_and_our_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for option in ("--tmkl_weight", "--lora_r", "--max_steps", "--dataset_name"):
        assert option in out


# ------------------------------------------------------------------------------------------------------------ eval


def test_eval_measures_base_and_adapted(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "held.jsonl", make_rows(6))
    argv = ["eval", "--model", str(model), "--adapter", str(adapter), "--probes", "target,drift"]
    assert main([*argv, "--dataset", str(data), "--quick", "--output", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    base, adapted = (arm["probes"] for arm in found["arms"])
    assert [arm["name"] for arm in found["arms"]] == ["base", "adapted"]
    assert f"{base['target']['loss']:.3f}" in out
    assert f"{adapted['target']['loss']:.3f}" in out
    assert base["target"]["loss"] != adapted["target"]["loss"]
    assert adapted["drift"]["full_kl"] >= adapted["drift"]["masked_kl"] * 0.5 > 0
    # The base of the pair is the model without any adapter.
    assert main(["eval", "--model", str(model), "--probes", "target", "--dataset", str(data), "--quick",
                 "--output", str(tmp_path / "base.json")]) == 0  # fmt: skip
    alone = json.loads((tmp_path / "base.json").read_text())["arms"]
    assert len(alone) == 1
    assert alone[0]["probes"]["target"]["loss"] == pytest.approx(base["target"]["loss"], abs=1e-6)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["eval", *argv]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_eval_refuses_what_cannot_work(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown probe 'taste'" in refused(["--model", str(model), "--probes", "taste"], capsys)
    assert "'target' needs held-out pairs" in refused(["--model", str(model), "--probes", "target"], capsys)
    assert "add --adapter DIR" in refused(["--model", str(model), "--probes", "drift", "--recipe", "arpabet"], capsys)
    assert "unknown recipe 'nope'" in refused(["--model", str(model), "--recipe", "nope"], capsys)
    assert "cannot be found or read" in refused(["--model", str(tmp_path / "no"), "--probes", "text"], capsys)
    text = write_rows(tmp_path / "text.jsonl", [{"text": "what"}])
    assert "need a prompt and its answer" in refused(["--model", str(model), "--dataset", str(text)], capsys)
    asked = write_rows(tmp_path / "asked.jsonl", [{"messages": [{"role": "user", "content": "what"}]}])
    assert "the messages of row 0" in refused(["--model", str(model), "--dataset", str(asked)], capsys)
    assert "is not an adapter" in refused(["--model", str(model), "--adapter", str(tmp_path)], capsys)


def test_held_out_rows_of_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "paris"}]
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}])
    assert held_out_rows(str(data)) == [{"prompt": turns[:1], "completion": turns[1:]}]


# --------------------------------------------------------------------------------------- an adapter against a model


def config_of(model: Path, **changes: Any) -> Any:
    return AutoConfig.from_pretrained(model, **changes)


def test_adapter_that_fits(model: Path, adapter: Path) -> None:
    check_adapter(adapter, config_of(model))


def test_adapter_of_another_model(model: Path, adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight has shape \(2, 16\), the model needs \(2, 32\)"):
        check_adapter(adapter, config_of(model, hidden_size=32))
    with pytest.raises(ValueError, match=r"adapts model\.layers\.1\..*which the model doesn't have"):
        check_adapter(adapter, config_of(model, num_hidden_layers=1))
    change_config(adapter, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    check_adapter(adapter, config_of(model))
    with pytest.raises(ValueError, match=r"needs model\.layers\.2\..*which the adapter doesn't have"):
        check_adapter(adapter, config_of(model, num_hidden_layers=3))
    change_config(adapter, target_modules=["wq", "wk"])
    with pytest.raises(ValueError, match="doesn't fit this Llama"):
        check_adapter(adapter, config_of(model))


def test_adapter_with_saved_embeddings(model: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    vocabulary = config_of(model).vocab_size
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(vocabulary, 16)
    save_file(weights, adapter / "adapter_model.safetensors")
    check_adapter(adapter, config_of(model))
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(vocabulary + 1, 16)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape"):
        check_adapter(adapter, config_of(model))


def test_prompt_learning_is_refused(model: Path, tmp_path: Path) -> None:
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    peft.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"prompt-learning adapter \(PROMPT_TUNING\)"):
        check_adapter(tmp_path / "prompt", config_of(model))


@pytest.mark.parametrize("initial", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_adapters_that_rewrote_the_base_are_refused(model: Path, adapter: Path, initial: str) -> None:
    change_config(adapter, init_lora_weights=initial)
    with pytest.raises(ValueError, match=f"initialised with '{initial}'.*not the base"):
        check_adapter(adapter, config_of(model))


def test_pickled_and_broken_weights_are_refused(model: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        check_adapter(adapter, config_of(model))
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which can run code"):
        check_adapter(adapter, config_of(model))
