"""`mtt sweep`: a study of many runs, shared by any number of workers, each run trained and measured once.

A study is one YAML file:

    name: arpabet
    model: package:smollm2
    recipes: [arpabet]
    probes: [target, text, facts, drift]
    sizes: quick                      # or full; tiny, to try a file
    methods:                          # options of mtt train; those in grid take each of their values
      ce: {method: ce, grid: {learning_rate: [5.0e-4, 1.0e-3]}}
      tmkl: {method: tmkl, learning_rate: 1.0e-3, grid: {tmkl_weight: [0.3, 1.0, 3.0]}}
    seeds: [0, 1, 2]
    checkpoints: [0.25, 0.5, 1.0]     # measured at these fractions of the run, its end always
    scales: [0.5, 0.75]               # and its end with the adapter scaled down, which costs no training
    train: {max_steps: 160, per_device_train_batch_size: 8}   # options of mtt train for all methods
    # search: true and trials: 30: Optuna's sampler chooses settings between the grid's lowest and highest value

The folder of a study:

    study.db                  Optuna's storage, where no --storage is given
    runs/KEY/                 config.yaml (mtt train's), log.txt, adapter, checkpoints, measured.json (what is done)
    base/                     the base on each recipe
    results/KEY.json          one trial: its settings and a point for each checkpoint and scale
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mask_the_target.front.record import versions, write_json, write_whole

if TYPE_CHECKING:
    import optuna
    from transformers import TrainerCallback

HEARTBEAT = 30  # seconds between two signs of life of a worker
GRACE = 180  # seconds without one, after which another worker takes its trial
POLL = 5.0  # seconds between two looks for work, while other workers have the last trials
RETRIES = 5  # of a trial whose worker was lost; one that kills each worker isn't tried for ever
POSTGRES_LOCK = 0x6D7474  # the number of the advisory lock that all workers on one server share
Result = dict[str, Any]

# Options of mtt train that the study sets itself, and what to set instead.
RESERVED = {
    "model_name_or_path": "model",
    "dataset_name": "recipes",
    "seed": "seeds",
    "output_dir": "--output",
    "resume_from_checkpoint": "nothing: a stopped trial goes on by itself",
    "save_total_limit": "nothing: the checkpoints are measured",
    "save_only_model": "nothing: a stopped trial goes on from its checkpoints",
}
# One process runs trials of several methods, and accelerate allows it one precision.
FOR_ALL = ("bf16", "fp16", "use_cpu", "dtype")


# ------------------------------------------------------------------------------------------------------ the file


@dataclass(frozen=True)
class Trial:
    """One run: what is trained, and how it is measured. `setting` are those of its options that its method's grid
    varies; `ranges` are left to the sampler (search). `key` is the same for the same trial on every machine."""

    key: str
    recipe: str
    method: str
    setting: dict[str, Any]
    seed: int
    model: str
    options: dict[str, Any]
    probes: list[str]
    sizes: str
    checkpoints: list[float]
    scales: list[float]
    ranges: dict[str, list[Any]]


@dataclass(frozen=True)
class Study:
    """A study file, checked. `methods`: {name: (fixed options, grid)}."""

    name: str
    model: str
    recipes: list[str]
    methods: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]]
    train: dict[str, Any]
    probes: list[str]
    sizes: str = "quick"
    seeds: tuple[int, ...] = (0, 1, 2)
    checkpoints: tuple[float, ...] = (0.25, 0.5, 1.0)
    scales: tuple[float, ...] = (0.5, 0.75)
    search: bool = False
    trials: int | None = None

    def parts(self) -> dict[str, list[Trial]]:
        """All trials, by the name of the Optuna study that holds them: one for each recipe and method."""
        return {
            f"{self.name}/{recipe}/{method}": list(self._trials(recipe, method))
            for recipe in self.recipes
            for method in self.methods
        }

    def _trials(self, recipe: str, method: str) -> Iterator[Trial]:
        fixed, grid = self.methods[method]
        if self.search:
            slots = [({"slot": number}, self.seeds[0]) for number in range(self.trials or 0)]
        else:
            settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            slots = [(setting, seed) for seed in self.seeds for setting in settings]
        for setting, seed in slots:
            varied = {} if self.search else setting
            trial = Trial(
                key="",
                recipe=recipe,
                method=method,
                setting=varied,
                seed=seed,
                model=self.model,
                options={**self.train, **fixed, **varied},
                probes=self.probes,
                sizes=self.sizes,
                checkpoints=list(self.checkpoints),
                scales=list(self.scales),
                ranges=grid if self.search else {},
            )
            text = json.dumps([asdict(trial), setting], sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:10]
            yield replace(trial, key=f"{recipe}-{method}-seed{seed}-{digest}")


def read_study(path: Path) -> Study:
    """Read and check a study file. Nothing is loaded: no data, no model.

    Raises FileNotFoundError or ValueError with a sentence that names the place, and the nearest valid name.
    """
    import yaml

    from mask_the_target.front.demo import SIZES
    from mask_the_target.front.evaluate import PROBES, check_probes
    from mask_the_target.front.recipes import RECIPES

    if not path.is_file():
        raise FileNotFoundError(f"There is no study file {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, but its content is {content!r:.80}.")
    known = [field.name for field in fields(Study)]
    for key in content:
        _check_known(str(key), known, "key", str(path))
    for key in ("name", "model", "recipes", "methods", "train", "probes"):
        if not content.get(key):
            raise ValueError(f"{path}: {key} is missing or empty.")
    for key in ("name", "model"):
        _require(isinstance(content[key], str), path, key, content[key], "must be a name")
    _require(_is_plain(content["name"]), path, "name", content["name"], "may hold letters, digits and ._+-")

    given: dict[str, Any] = dict(content)
    for key in ("recipes", "probes"):
        _check_list(path, key, content[key])
        for name in content[key]:
            _check_known(str(name), list(RECIPES) if key == "recipes" else PROBES, key[:-1], f"{path}: {key}")
    given["probes"] = check_probes(content["probes"])
    for needed in ("target", "text"):
        if not any(probe.split(":")[0] == needed for probe in given["probes"]):
            raise ValueError(f"{path}: probes lacks {needed!r}: a front needs what was learned and what was kept.")
    _check_known(str(content.get("sizes", "quick")), list(SIZES), "size", f"{path}: sizes")
    for key, kind in (("seeds", int), ("checkpoints", float), ("scales", float)):
        if key in content:
            _check_list(path, key, content[key], may_be_empty=key == "scales")
            given[key] = tuple(_number(value) for value in content[key])
            for value in given[key]:
                right = isinstance(value, int) if kind is int else isinstance(value, (int, float)) and 0 < value <= 1
                rule = "must be a whole number" if kind is int else "must lie in (0, 1]"
                _require(right and not isinstance(value, bool), path, key, value, rule)
            if kind is float:
                given[key] = tuple(float(value) for value in given[key])
    _check_search(path, content)

    if not isinstance(content["train"], dict):
        raise ValueError(f"{path}: train must hold options of mtt train, but is {content['train']!r:.80}.")
    given["train"] = {key: _number(value) for key, value in content["train"].items()}
    given["methods"] = _read_methods(path, content["methods"])
    study = Study(**given)
    _check_options(path, study)
    return study


def _read_methods(path: Path, methods: Any) -> dict[str, tuple[dict[str, Any], dict[str, list[Any]]]]:
    if not isinstance(methods, dict):
        raise ValueError(f"{path}: methods must hold 'name: {{options}}', but is {methods!r:.80}.")
    found = {}
    for name, method in methods.items():
        where = f"methods.{name}"
        _require(_is_plain(name), path, "methods", name, "may hold letters, digits and ._+-")
        if not isinstance(method, dict) or not method:
            raise ValueError(f"{path}: {where} must hold options of mtt train, but is {method!r:.80}.")
        fixed = {key: _number(value) for key, value in method.items() if key != "grid"}
        grid = method.get("grid", {})
        if not isinstance(grid, dict) or ("grid" in method and not grid):
            raise ValueError(f"{path}: {where}.grid must hold 'option: [values]', but is {grid!r:.80}.")
        for key, values in grid.items():
            _check_list(path, f"{where}.grid.{key}", values)
            if key in fixed:
                raise ValueError(f"{path}: {where} sets {key} twice, alone and in its grid. Remove one.")
        for key in (*fixed, *grid):
            if key in FOR_ALL:
                raise ValueError(f"{path}: {where} sets {key}, which must be one for all methods: set it in train.")
        found[name] = (fixed, {key: [_number(value) for value in values] for key, values in grid.items()})
    return found


def _check_search(path: Path, content: Mapping[str, Any]) -> None:
    search, trials = content.get("search", False), content.get("trials")
    _require(isinstance(search, bool), path, "search", search, "must be true or false")
    if not search:
        if trials is not None:
            raise ValueError(f"{path}: trials is for search: true; a grid's trials are counted from it. Remove it.")
        return
    _require(type(trials) is int and trials > 0, path, "trials", trials, "must be, with search: true, at least 1")
    if len(content.get("seeds", (0, 1, 2))) != 1:
        raise ValueError(
            f"{path}: a search runs each setting once: give one seed (seeds: [0]), and repeat the best settings as a "
            "grid with more."
        )


def _check_options(path: Path, study: Study) -> None:
    """Every method's options, as mtt train checks them."""
    from trl import ModelConfig, ScriptArguments, SFTConfig

    from mask_the_target.front.options import TMKLArguments, parse

    kinds: Any = (ScriptArguments, SFTConfig, ModelConfig, TMKLArguments)
    known = [field.name for kind in kinds for field in fields(kind)]
    places = {"train": study.train}
    for name, (fixed, grid) in study.methods.items():
        places |= {f"methods.{name}": fixed, f"methods.{name}.grid": grid}
    for where, options in places.items():
        for key in options:
            if key in RESERVED:
                raise ValueError(f"{path}: {where} sets {key}, which the study sets. Use {RESERVED[key]}.")
            _check_known(str(key), known, "option", f"{path}: {where}")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        for name, (fixed, grid) in study.methods.items():
            for values in itertools.product(*grid.values()):
                options = {**study.train, **fixed, **dict(zip(grid, values, strict=True))}
                _write_config(config, study.model, study.recipes[0], study.seeds[0], options, Path(folder))
                try:
                    settings = parse([str(config)])
                except ValueError as error:
                    raise ValueError(str(error).replace(str(config), f"{path}: methods.{name}")) from error
                _check_adapter(path, name, settings.tmkl.adapter, options, study.scales)


def _check_adapter(path: Path, name: str, adapter: str | None, options: Any, scales: Sequence[float]) -> None:
    from mask_the_target.cli import REWRITES_BASE

    initial = str(options.get("init_lora_weights", "")).lower()
    if adapter == "pissa" or initial.startswith(REWRITES_BASE):
        raise ValueError(
            f"{path}: methods.{name} starts with {adapter or initial}, which moves a part of the base's weights into "
            "the adapter, so that a checkpoint can't be measured as an adapter of the base. Choose another adapter."
        )
    if adapter in ("vera", "randlora") and scales:
        raise ValueError(f"{path}: methods.{name}: PEFT can't rescale {adapter}. Set scales: [], or another adapter.")


def _write_config(file: Path, model: str, recipe: str, seed: int, options: Mapping[str, Any], output: Path) -> None:
    import yaml

    settings = {
        "model_name_or_path": model,
        "dataset_name": f"recipe:{recipe}",
        "output_dir": str(output),
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,  # the study has one bar
        **options,
    }
    write_whole(file, yaml.safe_dump(settings, sort_keys=False).encode())


def _check_known(name: str, known: Sequence[str], kind: str, where: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else ""
        hint = hint or (f"Known: {', '.join(known)}." if len(known) < 20 else "'mtt train --help' lists all.")
        raise ValueError(f"{where}: unknown {kind} {name!r}. {hint}")


def _check_list(path: Path, key: str, values: Any, *, may_be_empty: bool = False) -> None:
    if not isinstance(values, list) or not (values or may_be_empty):
        raise ValueError(f"{path}: {key} must be a list of at least one value, but is {values!r:.80}.")
    seen = [_number(value) for value in values]
    for place, value in enumerate(seen):
        if value in seen[:place]:
            raise ValueError(f"{path}: {key} holds {value!r} twice.")


def _require(right: bool, path: Path, key: str, value: Any, rule: str) -> None:
    if not right:
        raise ValueError(f"{path}: {key} {rule}, but is {value!r:.80}.")


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name) is not None


def _number(value: Any) -> Any:
    """YAML reads 1e-3, without a point, as text."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


# ----------------------------------------------------------------------------------------------------- the queue


class Queue:
    """The trials of a study in Optuna's storage: each is enqueued once, and taken by one worker at a time.

    Optuna's own enqueueing and, on SQLite, its taking of a waiting trial are each a look and then a write. Here both
    are done by one worker at a time: under a file lock beside an SQLite database, under an advisory lock in PostgreSQL.
    Either is gone with the process that holds it, however that ends.

    Args:
        url: of an SQLite or PostgreSQL database.
        parts: the wanted trials by the name of the Optuna study that holds them.
        search: whether a multi-objective sampler completes the trials' settings.
    Raises:
        ConnectionError, ModuleNotFoundError or ValueError with a sentence if the storage can't be used.
    """

    def __init__(self, url: str, parts: Mapping[str, Sequence[Trial]], *, search: bool = False) -> None:
        import optuna

        _quiet_optuna()
        self._engine = _reach(url)
        self._optuna = optuna
        options: dict[str, Any] = {"pool_pre_ping": True}
        if self._engine.dialect.name == "sqlite":
            options["connect_args"] = {"timeout": 60}
        sampler = optuna.samplers.TPESampler(constant_liar=True) if search else optuna.samplers.RandomSampler()
        self._wanted = dict(parts)
        with self._alone():  # two that make the same tables at once fail
            self._storage = optuna.storages.RDBStorage(
                self._engine.url.render_as_string(hide_password=False),
                engine_kwargs=options,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
            )
            self._studies = {
                name: optuna.create_study(
                    storage=self._storage,
                    study_name=name,
                    directions=["minimize", "minimize"],
                    sampler=sampler,
                    load_if_exists=True,
                )
                for name in parts
            }
            for study in self._studies.values():
                study.set_metric_names(["target loss", "text loss rise"])
                self._fill(study)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._engine.dialect.name == "sqlite":
            from filelock import FileLock

            with FileLock(f"{self._engine.url.database}.lock"):
                yield
            return
        import sqlalchemy

        with self._engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({POSTGRES_LOCK})"))
            try:
                yield
            finally:
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_unlock({POSTGRES_LOCK})"))

    def _by_key(self, study: optuna.Study) -> dict[str, list[Any]]:
        """The tries of each wanted trial, the last one last. Those of an earlier file stay alone."""
        found: dict[str, list[Any]] = {trial.key: [] for trial in self._wanted[study.study_name]}
        for frozen in study.get_trials(deepcopy=False):
            key = frozen.user_attrs.get("trial", {}).get("key")
            if key in found:
                found[key].append(frozen)
        return found

    def _state(self, tries: Sequence[Any]) -> str:
        """done, failed (with a result: no further try), live (waiting or running), or missing."""
        states = self._optuna.trial.TrialState
        if any(frozen.state == states.COMPLETE for frozen in tries):
            return "done"
        if any("result" in frozen.user_attrs for frozen in tries if frozen.state == states.FAIL):
            return "failed"
        if any(frozen.state in (states.WAITING, states.RUNNING) for frozen in tries):
            return "live"
        lost = [frozen for frozen in tries if "stopped" not in frozen.user_attrs]
        return "failed" if len(lost) > RETRIES else "missing"

    def _fill(self, study: optuna.Study) -> None:
        """Enqueue what is missing: a new trial, or one whose worker was lost or stopped. Call with the lock held.

        Optuna's own callback for a retry acts after the stale trial was failed: a worker that dies in between takes the
        retry with it. This one looks at what there is, so the next worker does the same.
        """
        wanted = {trial.key: asdict(trial) for trial in self._wanted[study.study_name]}
        for key, tries in self._by_key(study).items():
            if self._state(tries) == "missing":
                # A sampled setting stays what it was, so that the run goes on from its checkpoint.
                study.enqueue_trial(tries[-1].params if tries else {}, user_attrs={"trial": wanted[key]})

    def take(self) -> Taken | None:
        """The next trial, marked as running, or None if none is waiting. Lost ones are enqueued again before."""
        states = self._optuna.trial.TrialState
        with self._alone():
            for study in self._studies.values():
                self._optuna.storages.fail_stale_trials(study)
                self._fill(study)
                for tries in self._by_key(study).values():
                    if tries and tries[-1].state == states.WAITING:
                        number = tries[-1]._trial_id
                        # Before it is taken: a trial without a sign of life would never be stale.
                        self._storage.record_heartbeat(number)
                        # As Study.ask does it, which would take the first of any file.
                        self._storage.set_trial_state_values(number, states.RUNNING)
                        return Taken(self, study, self._optuna.Trial(study, number))
        return None

    def counts(self) -> dict[str, int]:
        """Trials by state: done, failed, live (waiting or running), missing."""
        found = {"done": 0, "failed": 0, "live": 0, "missing": 0}
        for study in self._studies.values():
            for tries in self._by_key(study).values():
                found[self._state(tries)] += 1
        return found

    def results(self) -> list[Result]:
        """The result of every trial that has one, from whatever machine; a trial that was given up is a failed one."""
        found = []
        for study in self._studies.values():
            for tries in self._by_key(study).values():
                state = self._state(tries)
                if state in ("done", "failed"):
                    with_one = [frozen for frozen in tries if "result" in frozen.user_attrs]
                    lost = _failed(tries[-1].user_attrs["trial"], f"Its worker was lost {len(tries)} times.")
                    found.append(with_one[-1].user_attrs["result"] if with_one else lost)
        return found


class Taken:
    """A trial that this worker has. Give it back with `finish` or `stop`."""

    def __init__(self, queue: Queue, study: optuna.Study, trial: optuna.Trial) -> None:
        self._queue, self._study, self._trial = queue, study, trial
        self.trial = Trial(**trial.user_attrs["trial"])
        if self.trial.ranges:
            setting = {key: _suggest(trial, key, values) for key, values in self.trial.ranges.items()}
            self.trial = replace(self.trial, setting=setting, options={**self.trial.options, **setting})

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Record signs of life meanwhile, in a thread."""
        from optuna.exceptions import StorageInternalError

        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT):
                with contextlib.suppress(StorageInternalError):  # the storage may be away for a moment
                    self._queue._storage.record_heartbeat(self._trial._trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def finish(self, result: Result) -> None:
        """Store the result; a failed one is kept too, and not tried again."""
        states = self._queue._optuna.trial.TrialState
        with contextlib.suppress(self._queue._optuna.exceptions.UpdateFinishedTrialError):  # taken over by another
            self._trial.set_user_attr("result", result)
            values = [result["learned"], result["rise"]] if result["status"] == "complete" else None
            self._study.tell(self._trial, values, None if values else states.FAIL, skip_if_finished=True)

    def stop(self) -> None:
        """Give the trial back: the next worker goes on from its last checkpoint."""
        failed = self._queue._optuna.trial.TrialState.FAIL
        with contextlib.suppress(self._queue._optuna.exceptions.UpdateFinishedTrialError):
            self._trial.set_user_attr("stopped", True)
            self._study.tell(self._trial, state=failed, skip_if_finished=True)


def _suggest(trial: optuna.Trial, key: str, values: list[Any]) -> Any:
    """Between the lowest and highest of numbers, on a log scale if that is a factor of 10 or more; else one of them."""
    numbers = [value for value in values if type(value) in (int, float)]
    if len(numbers) < len(values) or len(values) < 2:
        return trial.suggest_categorical(key, values)
    low, high = min(numbers), max(numbers)
    log = low > 0 and high >= 10 * low
    if all(type(value) is int for value in numbers):
        return trial.suggest_int(key, low, high, log=log)
    return trial.suggest_float(key, low, high, log=log)


def _quiet_optuna() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _reach(url: str) -> Any:
    """An engine that was connected once. Raises ConnectionError, ModuleNotFoundError or ValueError with a sentence."""
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise ValueError(
            f"--storage {url!r} is not a database URL. Examples: postgresql://user@host/database, sqlite:///study.db."
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = parsed.render_as_string()  # without the password
    if parsed.get_backend_name() not in ("sqlite", "postgresql") or parsed.database in (None, "", ":memory:"):
        raise ValueError(f"--storage {shown}: give a file in SQLite (sqlite:///FILE) or a database in PostgreSQL.")
    options: dict[str, Any] = {"poolclass": sqlalchemy.NullPool}
    if parsed.get_backend_name() == "postgresql":
        options |= {"connect_args": {"connect_timeout": 10}, "isolation_level": "AUTOCOMMIT"}
    try:
        engine = sqlalchemy.create_engine(parsed, **options)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1" if parsed.get_backend_name() == "postgresql" else TABLES))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--storage {shown} needs the package {error.name}: pip install 'psycopg[binary]'"
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise ConnectionError(f"The storage {shown} can't be reached: {reason}. Nothing was started.") from error
    return engine


TABLES = "SELECT count(*) FROM sqlite_master"  # reads the file: SQLite opens anything


# ------------------------------------------------------------------------------------------------------- a trial


def steps_at(fractions: Sequence[float], max_steps: int) -> dict[int, float]:
    """The optimizer steps after which a run is measured, and the fraction that each stands for; its end always."""
    return {max(1, math.ceil(fraction * max_steps)): fraction for fraction in sorted({*fractions, 1.0})}


def _failed(trial: Mapping[str, Any], reason: str) -> Result:
    return {**trial, "status": "failed", "error": reason, "points": []}


def run_trial(
    trial: Trial, output: Path, callbacks: Sequence[TrainerCallback] = (), report: Callable[[str], None] = print
) -> Result:
    """Train and measure one trial in a study's folder, from where it was left; its result, also in results/KEY.json.

    The result holds the trial's fields and status (complete, failed), points (one for each checkpoint and scale:
    checkpoint, step, scale, learned, rise, probes), base (its probes), learned and rise of the last point at scale 1
    (target loss; rise of the text loss over the base, the mean over its sources; nats per token), seconds, versions.
    A run whose loss became NaN is a failed one, with an error. `report` is told what is being done.
    Raises Interrupted or KeyboardInterrupt; what is done then is kept.
    """
    from filelock import FileLock

    file, folder = output / "results" / f"{trial.key}.json", output / "runs" / trial.key
    folder.mkdir(parents=True, exist_ok=True)
    # A worker that was asleep for longer than GRACE may still be in this folder.
    with FileLock(folder / "lock"):
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        from mask_the_target.front.train import BadLossError

        with (folder / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            try:
                seconds = _train(trial, folder, callbacks, report)
                result = _measure(trial, output, folder, report)
                result["seconds"]["training"] = seconds
            except BadLossError as error:
                result = _failed(asdict(trial), str(error))
        write_json(file, result)
        for state in folder.glob("checkpoint-*/optimizer.*"):  # the bulk of a checkpoint, for going on only
            state.unlink()
        return result


def _train(trial: Trial, folder: Path, callbacks: Sequence[TrainerCallback], report: Callable[[str], None]) -> float:
    """Train up to the last checkpoint that is to be measured; seconds of training."""
    from transformers import TrainerCallback, set_seed

    from mask_the_target.front import train
    from mask_the_target.front.options import parse

    class Follow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            report(f"step {state.global_step}/{state.max_steps}")
            if state.global_step in steps_at(trial.checkpoints, state.max_steps):
                control.should_save = True
            return control

    newest = train.last_checkpoint(folder)
    if newest is None or _trainer_state(newest)["global_step"] < _trainer_state(newest)["max_steps"]:
        config = folder / "config.yaml"
        _write_config(config, trial.model, trial.recipe, trial.seed, trial.options, folder)
        set_seed(trial.seed)  # the adapter is made before the trainer sets it
        resume = ["--resume_from_checkpoint", "last"] if newest else []
        train.run(parse([str(config), *resume]), [Follow(), *callbacks])
        gc.collect()  # the trainer and its model are a cycle
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["seconds"]


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def _measure(trial: Trial, output: Path, folder: Path, report: Callable[[str], None]) -> Result:
    """Base, checkpoints and scales with one load of the base; what measured.json holds already is not done again."""
    import torch
    from peft.helpers import rescale_adapter_scale

    from mask_the_target.base import adapters_off
    from mask_the_target.front import train
    from mask_the_target.front.backbones import load_model, resolve_model
    from mask_the_target.front.demo import SIZES
    from mask_the_target.front.evaluate import evaluate_one
    from mask_the_target.front.recipes import find_recipe, recipe_rows

    newest = train.last_checkpoint(folder)
    assert newest is not None
    last = _trainer_state(newest)["max_steps"]
    states = [(step, fraction, 1.0) for step, fraction in steps_at(trial.checkpoints, last).items()]
    states += [(last, 1.0, scale) for scale in trial.scales if scale != 1]

    started = time.monotonic()
    path = resolve_model(trial.model)
    dtype = trial.options.get("dtype") or "float32"
    model, tokenizer = load_model(path, folder / f"checkpoint-{states[0][0]}", dtype=dtype)
    loaded = ("default", states[0][0])
    common: dict[str, Any] = {
        "target_rows": recipe_rows(trial.recipe)["test"],  # read once
        "max_new_tokens": find_recipe(trial.recipe).max_new_tokens,
        "sizes": SIZES[trial.sizes],
    }
    base = _base(trial, output, lambda probes: evaluate_one(model, tokenizer, probes, **common), adapters_off, model)

    file = folder / "measured.json"
    points = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for step, fraction, scale in states[len(points) :]:
        report(f"measuring step {step}" + (f", adapter x {scale}" if scale != 1 else ""))
        if step != loaded[1]:
            model.load_adapter(str(folder / f"checkpoint-{step}"), adapter_name=f"step{step}")
            model.set_adapter(f"step{step}")
            model.delete_adapter(loaded[0])
            model.eval()
            loaded = (f"step{step}", step)
        with rescale_adapter_scale(model, scale) if scale != 1 else nullcontext():
            probes = evaluate_one(model, tokenizer, trial.probes, base=base, **common)
        points.append(
            {
                "checkpoint": fraction,
                "step": step,
                "scale": scale,
                "learned": probes["target"]["loss"],
                "rise": _rise(probes, base),
                "probes": _without_samples(probes),
            }
        )
        write_json(file, points)
    end = next(point for point in points if point["step"] == last and point["scale"] == 1)
    finite = math.isfinite(end["learned"]) and math.isfinite(end["rise"])
    return {
        **asdict(trial),
        "status": "complete" if finite else "failed",
        **({} if finite else {"error": f"At its end, target loss {end['learned']} and text loss rise {end['rise']}."}),
        "learned": end["learned"],
        "rise": end["rise"],
        "points": points,
        "base": _without_samples(base),
        "seconds": {"measuring": time.monotonic() - started},
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _base(trial: Trial, output: Path, evaluate: Callable[[list[str]], Any], adapters_off: Any, model: Any) -> Any:
    """The base's result with samples, measured once for all trials that share model, recipe, probes and sizes."""
    from filelock import FileLock

    shared = [trial.model, trial.probes, trial.sizes, trial.options.get("dtype")]
    digest = hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:10]
    file = output / "base" / f"{trial.recipe}-{digest}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            with adapters_off(model):
                write_json(file, evaluate([probe for probe in trial.probes if probe != "drift"]))
    return json.loads(file.read_text(encoding="utf-8"))


def _rise(probes: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    return statistics.fmean(probes[name]["loss"] - base[name]["loss"] for name in base if name.startswith("text:"))


def _without_samples(probes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {key: v for key, v in found.items() if key != "samples"} for name, found in probes.items()}


# --------------------------------------------------------------------------------------------------- the worker


def run(
    study: Study, output: Path, storage: str | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> list[Result]:
    """Take trials until none is left, wait for those of other workers, and return all results (see `run_trial`).

    `storage` is a database's URL; default: study.db in the folder `output`. results/ then holds every trial's result,
    also of those that ran on other machines. Stopped by Ctrl-C, it goes on when called again. Raises what `Queue`
    raises, KeyboardInterrupt, and any error of a trial that isn't a NaN; that trial is given back first.
    """
    output.mkdir(parents=True, exist_ok=True)
    queue = Queue(storage or f"sqlite:///{output / 'study.db'}", study.parts(), search=study.search)
    total = sum(queue.counts().values())
    with tqdm(total=total, desc=study.name, unit="trial", smoothing=0) as bar:

        def show(what: str) -> None:
            found = queue.counts()
            bar.total, bar.n = sum(found.values()), found["done"] + found["failed"]
            bar.set_postfix_str(what)

        def follow(what: str) -> None:
            bar.set_postfix_str(f"{key} {what}")

        while True:
            taken = queue.take()
            if taken is None:
                left = queue.counts()["live"]
                if not left:
                    break
                show(f"waiting for {left} trials of other workers")
                time.sleep(POLL)
                continue
            key = taken.trial.key
            show(key)
            try:
                with taken.alive():
                    result = run_trial(taken.trial, output, callbacks, follow)
            except BaseException as error:
                taken.stop()
                if not isinstance(error, KeyboardInterrupt):
                    print(f"\nStopped in {key}; its log is {output / 'runs' / key / 'log.txt'}.", file=sys.stderr)
                raise
            taken.finish(result)
        show("")
    results = queue.results()
    for result in results:
        file = output / "results" / f"{result['key']}.json"
        if not file.exists():
            write_json(file, result)
    return results


def main(argv: Sequence[str]) -> int:
    """The command `mtt sweep`."""
    parser = argparse.ArgumentParser(
        prog="mtt sweep",
        description="Run every trial of a study once: train, measure at checkpoints and scales, keep the results. "
        "Start it as often and on as many machines as you like, with one --storage; each takes the next trial. "
        "Ctrl-C at any time; the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--storage", help="PostgreSQL URL shared by workers; default: SQLite in the study's folder")
    parser.add_argument("--output", type=Path, help="the study's folder; default: runs/NAME")
    options = parser.parse_args(list(argv))
    study = read_study(options.study)
    output = options.output or Path("runs") / study.name

    import datasets

    datasets.disable_progress_bars()
    try:
        results = run(study, output, options.storage)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"stopped; what is done is kept in {output}. Go on with: mtt sweep {' '.join(argv)}"
        ) from interrupt
    failed = [result for result in results if result["status"] == "failed"]
    print(f"{len(results)} trials, {len(failed)} failed. Their results are in {output / 'results'}.")
    for result in failed:
        print(f"  {result['key']}: {result['error']}")
    return 0
