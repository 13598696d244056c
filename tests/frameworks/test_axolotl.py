"""Axolotl's own `axolotl train` on the example file, with a toy model in place of the real one."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_cli
from axolotl.utils import distributed

from frameworks.toy import DATA, Recorder, write_toy
from mask_the_target import TMKL
from mask_the_target.integrations.axolotl import TMKLArgs
from mask_the_target.integrations.settings import KEYS, callback_from

PACKED = {
    "sample_packing": True,
    "micro_batch_size": 1,
    "pad_to_sequence_len": False,
    "attn_implementation": "sdpa",
}
EXAMPLE = Path(__file__).parents[2] / "examples" / "axolotl.yaml"


@pytest.fixture(autouse=True)
def _fresh_axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl keeps accelerate's process-wide state, which is made anew for each test."""
    monkeypatch.setattr(distributed, "distributed_state", None)


def _overrides(tmp_path: Path) -> dict[str, Any]:
    """What makes the example a matter of seconds: nothing of ours, nor of the data's form."""
    return {
        "base_model": str(write_toy(tmp_path / "toy")),
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "max_steps": 3,
        "learning_rate": 0.02,
        "lr_scheduler": "constant",
        "bf16": False,
        "use_cpu": True,
        # Axolotl turns its Triton kernels for LoRA on by itself, also where there is no GPU to run them.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_embedding_kernel": False,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"sample_packing": True, "micro_batch_size": 1, "attn_implementation": "sdpa"},
        {"tmkl_weight": 0.5, "tmkl_divergence": "jsd", "tmkl_temperature": 2.0, "tmkl_context_weight": 0.3},
        {"tmkl_context_weight": 0.3, "tmkl_anchors": "auto", "gradient_accumulation_steps": 2},
        {"tmkl_context_weight": 0.3, "tmkl_anchors": "auto", "tmkl_anchor_share": 0.5, **PACKED},
    ],
    ids=["example", "accumulation", "packing", "options", "anchors", "anchors-packing"],
)
def test_the_example_trains_on_the_reference_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])
    monkeypatch.setattr("sys.argv", ["axolotl"])
    recorder = Recorder(monkeypatch)
    do_cli(str(EXAMPLE), **_overrides(tmp_path), **settings)
    anchors = "tmkl_anchors" in settings
    ours = {key.removeprefix("tmkl_"): value for key, value in settings.items() if key.startswith("tmkl_")}
    options = TMKL(**{key: value for key, value in ours.items() if not key.startswith("anchor")})
    accumulation = settings.get("gradient_accumulation_steps", 1)
    recorder.check(tmp_path / "toy", options, steps=3, accumulation=accumulation)
    if anchors:
        recorder.check_anchors(tmp_path / "toy", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tmkl_wieght": 1.0}, "unknown key 'tmkl_wieght'. Did you mean 'tmkl_weight'?"),
        ({"tmkl_weight": -1.0}, "weight=-1.0 is not possible; it must be >= 0"),
        ({"tmkl_divergence": "backward"}, "divergence='backward' is unknown; choose one of 'forward'"),
        ({"tmkl_base": "of"}, "tmkl_base is 'of'; choose one of auto, off, initial, cached"),
        ({"tmkl_anchors": "auto"}, "without a context_weight has no effect"),
        ({"tmkl_context_weight": 1, "tmkl_anchors": "none.jsonl"}, "Anchors: there is no file 'none.jsonl'"),
        ({"tmkl_context_weight": 1, "tmkl_anchors": False}, "tmkl_anchors is False; give auto, none, or a file"),
        ({"tmkl_anchor_share": 0.5}, "tmkl_anchor_share is 0.5, and there are no anchors. Set tmkl_anchors: auto."),
        ({"tmkl_context_weight": 1, **PACKED, "pad_to_sequence_len": True}, "Set pad_to_sequence_len: false and micro"),
        ({"tmkl_context_weight": 1, **PACKED, "micro_batch_size": 2}, "would take padding for a prompt"),
        (
            {"tmkl_context_weight": 1, "pretraining_dataset": [{"path": "none"}]},
            "pretraining_dataset is packed while it is streamed",
        ),
        *(
            ({key: value}, f"{key}: {value!r} makes axolotl train on another loss than the model's own")
            for key, value in (
                ("rl", "kto"),
                ("reward_model", True),
                ("process_reward_model", True),
                ("orpo_alpha", 0.1),
                ("use_eaft", True),
                ("kd_trainer", True),
                ("diffusion", {"noise_schedule": "linear"}),
                ("hatchery", {"base_url": "http://localhost"}),
            )
        ),
        ({"relora": True}, "relora merges the adapter into the base's weights"),
        ({"adapter": None}, "no adapter is set, which asks for a full fine-tune"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        load_cfg(str(EXAMPLE), **(_overrides(tmp_path) | {"base_model": str(tmp_path / "none")} | settings))
    assert message in str(error.value)


def test_the_keys_are_those_of_the_other_frameworks_with_the_same_defaults() -> None:
    assert set(TMKLArgs.model_fields) == set(KEYS)
    assert callback_from(TMKLArgs.model_construct().model_dump(), "").options == TMKL()


def test_the_example_data_are_conversations() -> None:
    assert len(DATA.read_text(encoding="utf-8").splitlines()) == 32
