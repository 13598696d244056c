"""What `report_to` is given: each tracker's own store, read back by its own reader. No server, and no network."""

import json
import os

os.environ["DO_NOT_TRACK"] = "true"  # mlflow's telemetry
os.environ["GRADIO_ANALYTICS_ENABLED"] = "false"  # trackio's dashboard
os.environ["WANDB_ERROR_REPORTING"] = "false"

import socket
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("trackio") is None:  # importing it would settle where it writes
    pytest.skip("the trackers are not installed", allow_module_level=True)

from transformers import Trainer, TrainingArguments, default_data_collator

from conftest import batch, toy_llama, with_lora
from mask_the_target import TMKL, TMKLCallback

FIGURES = ("loss", "ce", "kl", "context_kl")
STEPS = 3
Values = dict[str, list[float]]


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Hosts other than this one that were looked up; they are not reached."""
    found: list[Any] = []
    look_up = socket.getaddrinfo

    def local_only(host: Any, *arguments: Any, **kwargs: Any) -> Any:
        if host not in (None, "localhost", "127.0.0.1", "0.0.0.0", "::1", b"localhost"):
            found.append(host)
            raise OSError(f"{host}: there is no network in this test")
        return look_up(host, *arguments, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local_only)
    return found


def _train(tmp_path: Path, tracker: str, **settings: Any) -> Values:
    """A run that reports to the tracker; what the trainer logged itself."""
    data = batch(rows=4, length=12)
    rows = [{name: value[i] for name, value in data.items()} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        run_name="with-tmkl",
        per_device_train_batch_size=4,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=0.05,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=tracker,
        **settings,
    )
    trainer = Trainer(
        model=with_lora(toy_llama(), moved=0.2),
        args=arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[TMKLCallback(TMKL(weight=0.5, context_weight=0.3))],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in logs] for name in FIGURES}


def _tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Values, Values]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logged = _train(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    return logged, {name: [event.value for event in events.Scalars(f"train/{name}")] for name in FIGURES}


def _wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Values, Values]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged = _train(tmp_path, "wandb")

    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits until the run is written
    stored: Values = {name: [] for name in FIGURES}
    for data in _records(next(tmp_path.rglob("run-*.wandb")).read_bytes()):
        for item in Record.FromString(data).history.item:
            name = (item.key or ".".join(item.nested_key)).removeprefix("train/")
            if name in stored:
                stored[name].append(json.loads(item.value_json))
    return logged, stored


def _records(file: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, in which W&B keeps a run: blocks of 32 KiB, and in them checksum, length, kind, data.

    W&B has no reader of its own in Python any more.
    """
    assert file[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(file):
        left = 32768 - position % 32768
        if left < 7:  # too few for a header
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", file, position)
        parts += file[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield parts
            parts = b""


def _mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Values, Values]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    monkeypatch.chdir(tmp_path)  # where artifacts go
    logged = _train(tmp_path, "mlflow")

    import mlflow

    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    run = client.search_runs(experiment_ids=["0"])[0].info.run_id
    stored = {name: sorted(client.get_metric_history(run, name), key=lambda metric: metric.step) for name in FIGURES}
    return logged, {name: [metric.value for metric in metrics] for name, metrics in stored.items()}


def _trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Values, Values]:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    logged = _train(tmp_path, "trackio", project="toy", trackio_space_id=None, trackio_static_space_id=False)

    from trackio.sqlite_storage import SQLiteStorage

    rows = [row for row in SQLiteStorage.get_logs("toy", "with-tmkl") if "train/loss" in row]
    return logged, {name: [row[f"train/{name}"] for row in rows] for name in FIGURES}


@pytest.mark.parametrize("tracker", [_tensorboard, _wandb, _mlflow, _trackio], ids=lambda tracker: tracker.__name__[1:])
def test_the_terms_reach_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any], tracker: Any
) -> None:
    logged, stored = tracker(tmp_path, monkeypatch)
    for name in FIGURES:
        assert len(stored[name]) == STEPS, name
        assert stored[name] == pytest.approx(logged[name], rel=1e-6), name
        assert min(stored[name]) > 0, name
    assert asked == []
