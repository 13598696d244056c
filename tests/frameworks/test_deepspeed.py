"""DeepSpeed's ZeRO on CPUs, with gloo: several processes give the loss and the update of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from conftest import toy_llama

TESTS = Path(__file__).resolve().parents[1]


def run(ranks: int, what: str, folder: Path | None = None) -> Any:
    """What zero.py found on so many processes."""
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(TESTS / "frameworks" / "zero.py"), what, *([] if folder is None else [str(folder)])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))[8:])


@pytest.mark.parametrize("ranks", [2, 3])
def test_loss_and_first_update_are_those_of_one_process(ranks: int) -> None:
    """ZeRO-1, 2 and 3; unequal supervised tokens, a rank without any, accumulation, checkpointing, packing, a cached
    base."""
    found = run(ranks, "loop")
    assert len(found) == 21
    for name, case in found.items():
        assert case["loss"] == pytest.approx(case["expected"], rel=1e-5), name
        assert case["moved"] > 1e-3, name
        assert case["error"] < 1e-6, name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_llama(pad_token_id=None).save_pretrained(tmp_path / "base")
    return tmp_path


def test_the_trainer_logs_what_it_does_in_one_process(folder: Path) -> None:
    """Also of a model that from_pretrained has partitioned for ZeRO-3; and a run that goes on from its checkpoint."""
    alone = run(1, "0", folder)
    assert len(alone) == 4
    assert alone[-1]["kl"] > 1e-3
    for ranks, what in [(2, "1"), (2, "2"), (2, "3"), (2, "3 partitioned"), (2, "3 partitioned resume"), (3, "3")]:
        for here, there in zip(run(ranks, what, folder), alone, strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-6), what


def test_what_needs_whole_weights_is_refused(folder: Path) -> None:
    assert "Let mtt anchors write a file beforehand" in run(2, "3 partitioned anchors", folder)
    assert "sharded (FSDP, ZeRO-3, tensor parallelism). Use DDP or ZeRO-2" in run(2, "3 partitioned pissa", folder)
    message = run(2, "3 partitioned separate", folder)
    assert "LlamaForCausalLM is partitioned (ZeRO-3), and no engine gathers its weights for a forward" in message
    assert "As a base of its own, load it whole" in message
