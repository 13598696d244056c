"""The example scripts, as a user runs them, on a toy model: what they print of their losses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from front.test_train import make_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launch(tmp_path: Path, model: Path, processes: int) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "1"]
    if processes > 1:  # accelerate launch starts several on a CPU with MPI only
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    out = run(tmp_path, *launch, str(EXAMPLES / "accelerate_loop.py"), "--model", str(model), "--steps", "6")
    steps = re.findall(r"step \d+: ce ([\d.]+), kl ([\d.]+)", out)
    assert len(steps) == 6 // processes  # a loader is shared out over the processes
    assert float(steps[0][1]) == 0 < float(steps[-1][1])
    assert float(steps[-1][0]) < float(steps[0][0])
    assert (tmp_path / "runs/accelerate_loop/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["lightning_module", "fabric_loop"])
def test_lightning(tmp_path: Path, model: Path, name: str) -> None:
    pytest.importorskip("lightning")
    out = run(tmp_path, sys.executable, str(EXAMPLES / f"{name}.py"), "--model", str(model), "--steps", "6")
    if name == "lightning_module":
        found = {key: float(value) for key, value in re.findall(r"'(\w+)': ([\d.]+)", out)}
        assert found["kl"] > 0
        assert found["loss"] == pytest.approx(found["ce"] + found["kl"], rel=1e-3)
    else:
        steps = re.findall(r"step \d+: ce ([\d.]+), kl ([\d.]+)", out)
        assert float(steps[0][1]) == 0 < float(steps[-1][1])
    assert (tmp_path / f"runs/{name}/adapter_model.safetensors").is_file()
