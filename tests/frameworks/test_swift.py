"""`swift sft` on the example file, in ms-swift's own trainer, with a toy model in place of the real one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("swift.pipelines", reason="ms-swift is not installed")

from swift import rlhf_main, sft_main
from swift.cli import sft
from swift.cli.main import parse_yaml_args

from frameworks.toy import DATA, Recorder, write_toy
from mask_the_target import TMKL

EXAMPLE = Path(__file__).parents[2] / "examples" / "swift.yaml"


def _arguments(tmp_path: Path, **settings: Any) -> list[str]:
    """The command's, with what makes the example a matter of seconds."""
    settings = {
        "model": write_toy(tmp_path / "toy"),
        "model_type": "llama",
        "template": "chatml",
        "output_dir": tmp_path / "out",
        "torch_dtype": "float32",
        "bf16": "false",
        "max_steps": 3,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "use_cpu": "true",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "check_model": "false",
    } | settings
    argv = [str(EXAMPLE)]
    parse_yaml_args(argv)
    return [*argv, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def _run(tmp_path: Path, **settings: Any) -> None:
    sft_main(_arguments(tmp_path, **settings))


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])
    for name in [name for name in os.environ if name.startswith("TMKL_")]:  # what another run's YAML set
        monkeypatch.delenv(name)
    monkeypatch.setenv("TMKL_WEIGHT", "1.0")  # as the example's ENV, which gives way to what is set
    monkeypatch.setenv("SWIFT_CONFIG_FILE", str(EXAMPLE))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": "false", "loss_scale": "last_round"},
        {"TMKL_WEIGHT": "0.5", "TMKL_DIVERGENCE": "jsd", "TMKL_TEMPERATURE": "2.0"},
    ],
    ids=["example", "accumulation", "no-checkpointing", "options"],
)
def test_the_example_trains_on_the_reference_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    ours = {key: settings.pop(key) for key in list(settings) if key.startswith("TMKL")}
    for key, value in ours.items():
        monkeypatch.setenv(key, value)
    recorder = Recorder(monkeypatch)
    _run(tmp_path, **settings)
    options = TMKL(weight=0.5, divergence="jsd", temperature=2.0) if ours else TMKL()
    recorder.check(tmp_path / "toy", options, steps=3, accumulation=settings.get("gradient_accumulation_steps", 1))
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_dft_loss": "true"}, "enable_dft_loss: for this, swift takes the labels out of the batch"),
        ({"enable_channel_loss": "true"}, "enable_channel_loss: for this, swift takes the labels out of the batch"),
        ({"loss_type": "cross_entropy"}, "loss_type 'cross_entropy': for this, swift takes the labels out"),
        ({"loss_scale": "react"}, "loss_scale, which weighs tokens with more than 0 and 1: for this"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1: for this, swift takes the labels out"),
        ({"tuner_type": "full"}, "tuner_type is 'full', which trains the base's own weights"),
    ],
)
def test_settings_in_which_swift_takes_the_labels_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        _run(tmp_path, **settings)
    assert message in str(error.value)


def test_parallel_sequences_are_refused_on_each_rank(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, sequence_parallel_size=2, ddp_backend="gloo")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", sft.__file__]
    ran = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, check=False)
    assert ran.stderr.count("ValueError: sequence_parallel_size 2: for this, swift takes the labels out") >= 1


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "simpo", "rm"])
def test_trainers_of_other_losses_are_refused(tmp_path: Path, kind: str) -> None:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    more = {"label": True} if kind == "kto" else {"rejected_response": "no"}
    data = tmp_path / "preferences.jsonl"
    data.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        rlhf_main(_arguments(tmp_path, rlhf_type=kind, dataset=data))
    assert "Trainer trains on another loss than the model's own, and TMKL would not be in it" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TMKL_WIEGHT", "1", "TMKL_* in the environment: unknown key 'tmkl_wieght'. Did you mean 'tmkl_weight'?"),
        ("TMKL_CONTEXT_WEIGHT", "0.5", "TMKL_CONTEXT_WEIGHT (and TMKL_MAX_DRIFT, TMKL_ANCHORS) don't go with ms-swift"),
        ("TMKL_MAX_DRIFT", "0.01", "TMKL_MAX_DRIFT, TMKL_ANCHORS) don't go with ms-swift"),
        ("TMKL_ANCHORS", "auto", "TMKL_MAX_DRIFT, TMKL_ANCHORS) don't go with ms-swift"),
    ],
)
def test_wrong_variables_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        _run(tmp_path)
    assert message in str(error.value)


def test_the_module_itself_is_not_a_plugin_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mask_the_target.integrations import swift

    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ImportError, match=r"import mask_the_target.integrations.swift"):
        _run(tmp_path, external_plugins=swift.__file__)
