"""`mtt llamafactory` on the example file, in LLaMA-Factory's own trainer, with a toy model in place of the real one."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llamafactory")

from frameworks.toy import Recorder, write_toy
from mask_the_target import TMKL
from mask_the_target.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "llamafactory.yaml"


def _arguments(tmp_path: Path, **settings: Any) -> list[str]:
    """The command's, with what makes the example a matter of seconds."""
    settings = {
        "model_name_or_path": tmp_path / "toy",
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "use_cpu": "true",
        "preprocessing_num_workers": 1,
    } | settings
    return ["llamafactory", str(EXAMPLE), *(f"{key}={value}" for key, value in settings.items())]


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])
    monkeypatch.setenv("MTT_TRACEBACK", "1")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "lora_dropout": 0.0},
        {"packing": "true", "neat_packing": "true", "per_device_train_batch_size": 1},
        {"tmkl_weight": 0.5, "tmkl_divergence": "jsd", "tmkl_temperature": 2.0, "tmkl_exclude_base_above": 0.5},
        {"tmkl_context_weight": 0.3, "tmkl_anchors": "auto", "gradient_accumulation_steps": 2},
        {"tmkl_context_weight": 0.3, "packing": "true", "per_device_train_batch_size": 1},
    ],
    ids=["example", "accumulation", "packing", "options", "anchors", "context-packing"],
)
def test_the_example_trains_on_the_reference_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    write_toy(tmp_path / "toy")
    recorder = Recorder(monkeypatch)
    assert main(_arguments(tmp_path, **settings)) == 0
    anchors = settings.pop("tmkl_anchors", None)
    options = TMKL(**{key.removeprefix("tmkl_"): value for key, value in settings.items() if key.startswith("tmkl_")})
    accumulation = settings.get("gradient_accumulation_steps", 1)
    recorder.check(tmp_path / "toy", options, steps=3, accumulation=accumulation)
    if anchors:
        recorder.check_anchors(tmp_path / "toy", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tmkl_wieght": 1.0}, "unknown key 'tmkl_wieght'. Did you mean 'tmkl_weight'?"),
        ({"tmkl_weight": "much"}, "TMKL: weight='much' is not possible; it must be >= 0"),
        ({"stage": "dpo"}, "stage is 'dpo', whose loss is not the model's own"),
        ({"finetuning_type": "full"}, "finetuning_type is 'full', which trains the base's own weights"),
        *(
            ({key: "true"}, f"{key} makes LLaMA-Factory train on another loss than the model's own")
            for key in ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "use_mca", "use_hyper_parallel")
        ),
        ({"tmkl_context_weight": 1, "tmkl_anchors": "auto", "stage": "pt"}, "stage: pt makes targets of every token"),
        ({"tmkl_context_weight": 1, "tmkl_anchors": "auto", "packing": "true"}, "packing: rows that are packed can't"),
        ({"tmkl_context_weight": 1, "neat_packing": "true"}, "neat_packing gives tmkl_context_weight no mask in which"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 makes the trainer compute its own loss"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    if "label_smoothing_factor" in settings:  # refused when the trainer is built
        write_toy(tmp_path / "toy")
    assert main(_arguments(tmp_path, **settings)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("USE_RAY", "Ray runs the training in processes of its own"),
        ("USE_MCA", "USE_MCA=1 trains in Megatron"),
        ("FORCE_TORCHRUN", "torchrun --nproc_per_node N --no-python mtt llamafactory CONFIG.yaml"),
    ],
)
def test_other_launchers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert main(_arguments(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_more_than_one_device_is_refused_without_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert main(_arguments(tmp_path)) == 2
    assert "llamafactory-cli would start one process for each device by itself; mtt doesn't" in capsys.readouterr().err
