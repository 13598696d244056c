"""Several processes give the loss and the first update of one: DDP, FSDP1 and FSDP2 on CPUs, with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import toy_llama
from options import ALL_OPTIONS
from ranks_trainer import FIGURES, train
from ranks_vocabulary import trained, with_column_lora

HERE = Path(__file__).resolve().parent


def launch(ranks: int, script: str, *arguments: str) -> str:
    """What a script here prints in so many processes."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results_of(output: str, *names: str) -> list[Any]:
    """What the lines that begin with each of ``names`` say, as JSON."""
    lines = [next(line for line in output.splitlines() if line.startswith(name)) for name in names]
    return [json.loads(line.removeprefix(name)) for line, name in zip(lines, names, strict=True)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_loss_and_first_update_are_those_of_one_process(ranks: int) -> None:
    """Unequal supervised tokens, a rank without any, accumulation, checkpointing, packing, each kind of base and of
    head; see ranks.py."""
    messages, found = results_of(launch(ranks, "ranks.py"), "MESSAGES ", "RESULTS ")
    assert len(found) == 45
    for name, case in found.items():
        assert case["loss"] == pytest.approx(case["expected"], rel=1e-5), name
        assert case["moved"] > 1e-3, name
        assert case["error"] < 1e-6, name

    assert messages["sharded"].startswith("LlamaForCausalLM is sharded already")
    assert "Attach first, then shard" in messages["sharded"]
    assert "would not reach the optimizer. Use DDP, ZeRO-2 or FSDP2" in messages["head's parts"]
    assert "the base's fingerprint needs whole weights. To use it, fill it before" in messages["cached base"]
    assert "which would be held to an empty model. Turn cpu_ram" in messages["first process's base"]
    assert messages["weights given"] == ""
    for weights in ("first process's weights", "sharded weights"):
        assert "the cache is filled by whole weights, and this model is sharded" in messages[weights]
    for form in ("fsdp1", "fsdp2"):
        assert "sharded (FSDP, ZeRO-3, tensor parallelism). Use DDP or ZeRO-2" in messages[f"initial adapter, {form}"]


def test_the_trainer_logs_over_two_processes_what_it_does_in_one(tmp_path: Path) -> None:
    """DDP, FSDP1 and FSDP2, with a budget whose weight moves, and weights that only the first process has loaded; saved
    runs of DDP and FSDP2 go on in three processes, and in one."""
    (found,) = results_of(launch(2, "ranks_trainer.py", str(tmp_path)), "RESULTS ")
    alone = train(tmp_path / "alone", accumulate=2)
    assert len(alone) == 6
    assert alone[-1]["kl"] > 1e-3
    weights = [entry["context_weight"] for entry in alone]
    assert weights[-1] > 1.1 * weights[0]
    assert found["context weights"][0] == found["context weights"][1]
    del found["context weights"]
    for ranks in (3, 1):
        (resumed,) = results_of(launch(ranks, "ranks_trainer.py", str(tmp_path), "resume"), "RESULTS ")
        found |= {f"{name}, resumed in {ranks}": run for name, run in resumed.items()}
    assert len(found) == 8
    for name, run in found.items():  # of those that were resumed, three are from the checkpoint
        for here, there in zip(run, alone, strict=True):
            figures = [here[figure] for figure in FIGURES]
            assert figures == pytest.approx([there[figure] for figure in FIGURES], rel=1e-3), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sharded_vocabulary_is_never_gathered(ranks: int, tmp_path: Path) -> None:
    """Tensor parallelism: every option's terms and gradients, and first steps of a sharded model, by hand and in
    transformers' Trainer; no rank makes the whole vocabulary's logits. See ranks_vocabulary.py."""
    if ranks == 2:
        pytest.importorskip("transformers.distributed.tensor_parallel", reason="an older kind of tensor parallelism")
    messages, functional, models, steps = results_of(
        launch(ranks, "ranks_vocabulary.py"), "MESSAGES ", "FUNCTIONAL ", "MODELS ", "STEPS "
    )
    assert len(functional) == 2 * len(ALL_OPTIONS) + 2
    for name, case in functional.items():
        assert case["terms"] < 1e-12, name
        assert case["gradients"] < 1e-12, name
        assert case["width"] == {2: 7, 3: 5}[ranks], name  # of 13 tokens
    assert "placements [Replicate()]; only one whose vocabulary is sharded" in messages["placements"]
    if ranks == 3:
        assert "4 tokens over 3 processes leaves one of them without" in messages["few tokens"]
        return
    assert len(models) == 4
    for name, case in models.items():
        assert case["loss"] == pytest.approx(case["expected"], rel=1e-5), name
        assert case["kl"] == pytest.approx(case["expected kl"], rel=1e-5), name
        assert case["kl"] > 0.1, name
        assert case["moved"] > 1e-3, name
        assert case["error"] < 1e-6, name
        assert case["width"] == 48, name  # of 96 tokens
    alone = trained(with_column_lora(toy_llama(vocab_size=96), moved=0.2), str(tmp_path))
    assert len(steps) == len(alone) == 2
    for here, there in zip(steps, alone, strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    assert "'model.embed_tokens.weight' is sharded or not loaded, so the base can't be" in messages["cached base"]
    assert "Load both with the same tensor parallelism" in messages["whole base"]
    assert "sharded (FSDP, ZeRO-3, tensor parallelism)" in messages["initial adapter"]
    assert "is sharded already, by its vocabulary (tensor parallelism) or because FSDP2" in messages["saved head"]
    assert "load the model sharded, with from_pretrained" in messages["torch's own"]
