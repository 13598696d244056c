"""The trials of a study in Optuna's storage, shared by any number of workers on any number of machines."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mask_the_target.front.study import Trial

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 30  # seconds between two signs of life of a worker
GRACE = 180  # seconds without one, after which another worker takes its trial
RETRIES = 5  # of a trial whose worker was lost; one that kills each worker isn't tried for ever
POSTGRES_LOCK = 0x6D7474  # the number of the advisory lock that all workers on one server share
SQLITE_PROBE = "SELECT count(*) FROM sqlite_master"  # reads the file: SQLite opens anything
Result = dict[str, Any]


def failed(trial: Mapping[str, Any], reason: str) -> Result:
    """The result of a trial that has none: see `sweep.run_trial`."""
    return {**trial, "status": "failed", "error": reason, "points": []}


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
                    lost = failed(tries[-1].user_attrs["trial"], f"Its worker was lost {len(tries)} times.")
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
        state = self._queue._optuna.trial.TrialState.FAIL
        with contextlib.suppress(self._queue._optuna.exceptions.UpdateFinishedTrialError):
            self._trial.set_user_attr("stopped", True)
            self._study.tell(self._trial, state=state, skip_if_finished=True)


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
            connection.execute(
                sqlalchemy.text("SELECT 1" if parsed.get_backend_name() == "postgresql" else SQLITE_PROBE)
            )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--storage {shown} needs the package {error.name}: pip install 'mask-the-target[postgresql]'"
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise ConnectionError(f"The storage {shown} can't be reached: {reason}. Nothing was started.") from error
    return engine
