"""Several processes give the loss and the first update of one: DDP, FSDP1 and FSDP2 on CPUs, with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("ranks", [2, 3])
def test_loss_and_first_update_are_those_of_one_process(ranks: int) -> None:
    """Unequal supervised tokens, a rank without any, accumulation, each kind of base and of head; see ranks.py."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*command, str(HERE / "ranks.py")], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    messages, found = (
        json.loads(next(line for line in done.stdout.splitlines() if line.startswith(name)).removeprefix(name))
        for name in ("MESSAGES ", "RESULTS ")
    )
    assert len(found) == 37
    for name, case in found.items():
        assert case["loss"] == pytest.approx(case["expected"], rel=1e-5), name
        assert case["moved"] > 1e-3, name
        assert case["error"] < 1e-6, name

    assert messages["sharded"].startswith("LlamaForCausalLM is sharded already")
    assert "Attach first, then shard" in messages["sharded"]
    assert "would not reach the optimizer. Use DDP, ZeRO-2 or FSDP2" in messages["head's parts"]
    assert messages["cached base, ddp"] == "on"
    for form in ("fsdp1", "fsdp2"):
        assert "where these are sharded (FSDP, ZeRO-3). Use DDP or ZeRO-2" in messages[f"initial adapter, {form}"]
        assert "base='cached' is off from here on" in messages[f"cached base, {form}"]
        assert "one may find its sequences where another doesn't" in messages[f"cached base, {form}"]
