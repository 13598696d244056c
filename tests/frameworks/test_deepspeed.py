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

TESTS = Path(__file__).resolve().parents[1]


def run(ranks: int, what: str) -> Any:
    """What zero.py found on so many processes."""
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(TESTS / "frameworks" / "zero.py"), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))[8:])


@pytest.mark.parametrize("ranks", [2, 3])
def test_loss_and_first_update_are_those_of_one_process(ranks: int) -> None:
    """ZeRO-1, 2 and 3; unequal supervised tokens, a rank without any, and accumulation."""
    found = run(ranks, "loop")
    assert len(found) == 12
    for name, case in found.items():
        assert case["loss"] == pytest.approx(case["expected"], rel=1e-5), name
        assert case["moved"] > 1e-3, name
        assert case["error"] < 1e-6, name


def test_the_trainer_logs_what_it_does_in_one_process() -> None:
    alone = run(1, "0")
    assert len(alone) == 3
    assert alone[-1]["kl"] > 1e-3
    for stage in ("1", "2", "3"):
        for here, there in zip(run(2, stage), alone, strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-6)


def test_a_model_that_was_partitioned_when_it_was_loaded_is_refused() -> None:
    assert "is partitioned already (ZeRO-3, FSDP)" in run(2, "3 partitioned")
