"""Tasks of lm-evaluation-harness as probes: `lm_eval:hellaswag`, or `lm_eval:FOLDER/task.yaml` for one of your own.

A task runs on the model as it is loaded: on the base too, with its adapters off. Where the tokenizer has a chat
template, all of a task's prompts are asked in it, for base and adapted alike, few-shot examples as turns: so are the
facts and the target, since that is how such a model is trained and used. Figures published for a model without its
template are therefore others. A text's own likelihood (`loglikelihood_rolling`) has no prompt, and no template.

Refused is what would run code of strangers: tasks that execute what a model writes (`unsafe_code`), data sets with code
(`trust_remote_code`), metrics that the package `evaluate` downloads. Functions in a task's own folder do run.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import math
import os
import random
import statistics
from collections.abc import Iterator, Mapping
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mask_the_target.attach import inner_model
from mask_the_target.front.backbones import package_folder
from mask_the_target.front.probes import evenly, measuring

PREFIX = "lm_eval:"
INSTALL = "pip install 'mask-the-target[eval]'"
SEED = 1234  # the harness's own
RESAMPLES = 1000  # for the harness's standard errors that are bootstrapped


# --- which task ------------------------------------------------------------------------------------------------------


def check_task(name: str) -> list[str]:
    """The tasks and groups that a name stands for: a tag's tasks, else itself. No data and no model is loaded.

    Args:
        name: a task, group or tag that the harness knows, or a task file that ends with ".yaml".
    Raises:
        ModuleNotFoundError: the harness isn't installed.
        FileNotFoundError: there is no such file.
        ValueError: an unknown name (the nearest ones are named), a group without a figure of its own, or a task that
            would run strangers' code.
    """
    manager, spec = _find(name)
    index = manager.task_index
    if isinstance(spec, str) and index[spec].kind.name == "TAG":
        return [task for member in sorted(index[spec].tags) for task in check_task(member)]
    for config in _configs(index, spec):
        reason = _refusal(config)
        if reason:
            task = config.get("task") if isinstance(config.get("task"), str) else name
            raise ValueError(f"{PREFIX}{name} is refused: {task} {reason}. Choose another task.")
    config = index[spec].cfg if isinstance(spec, str) else spec
    if "group" in config and not config.get("aggregate_metric_list"):
        members = [m if isinstance(m, str) else m.get("group", m.get("task")) for m in config.get("task") or []]
        raise ValueError(
            f"{PREFIX}{name} is a group without a figure of its own. Ask for its members: "
            f"{', '.join(map(str, members))}."
        )
    return [name]


def _find(name: str) -> tuple[Any, str | dict[str, Any]]:
    """The harness's task manager, and the name that it knows or the content of the task file."""
    package_folder("lm_eval", f"the probe {PREFIX + name!r}", INSTALL)
    if not _is_file(name):
        manager = _registered()
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "'lm-eval ls tasks' lists all."
            raise ValueError(f"unknown task {name!r} of lm-evaluation-harness. {hint} A task of your own: FILE.yaml.")
        return manager, name
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml  # the harness has no public reader

    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{PREFIX}{name}: there is no task file {name!r}.")
    try:
        config = load_yaml(path, resolve_func=False)
    except Exception as error:  # YAML's and the harness's own
        raise ValueError(f"{PREFIX}{name} is not a task file: {_first_line(error)}") from error
    if not ({"task", "group"} & set(config)):
        raise ValueError(f"{PREFIX}{name} is not a task file: it has neither 'task' nor 'group'.")
    folder = path.parent if "group" in config else None  # a group's members are its neighbours
    with _as_it_was(progress=False):
        return TaskManager(include_path=folder, include_defaults=False), config


def _is_file(name: str) -> bool:
    return name.endswith(".yaml")


@cache
def _registered() -> Any:
    """All that the harness brings: 14,000 files, ten seconds."""
    from lm_eval.tasks import TaskManager

    with _as_it_was(progress=False):
        return TaskManager()


def _configs(index: Mapping[str, Any], spec: str | Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The content of a task file and, for a group, of all its members."""
    if isinstance(spec, str):
        if spec not in index:
            return
        if index[spec].kind.name == "TAG":
            for member in sorted(index[spec].tags):
                yield from _configs(index, member)
            return
        spec = index[spec].cfg or {}
    yield spec
    members = spec.get("task")
    for member in members if isinstance(members, list) else []:
        yield from _configs(index, member)
        if isinstance(member, dict):  # a task or group by name, with settings of its own
            yield from _configs(index, str(member.get("group", member.get("task"))))


def _refusal(config: Mapping[str, Any]) -> str | None:
    from lm_eval.api import metrics  # noqa: F401  it registers them
    from lm_eval.api.registry import metric_registry

    if config.get("unsafe_code"):
        return "executes code that the model writes (unsafe_code)"
    if (config.get("dataset_kwargs") or {}).get("trust_remote_code"):
        return "runs code of its data set (trust_remote_code)"
    for metric in config.get("metric_list") or [] if "process_results" not in config else []:
        name = metric.get("metric")
        downloaded = name not in metric_registry and isinstance(name, str) and os.sep not in name  # a function's path
        if metric.get("hf_evaluate") or downloaded:
            return f"scores with {name!r}, whose code the package evaluate downloads"
    return None


# --- loading and running ---------------------------------------------------------------------------------------------


def load_task(name: str) -> Any:
    """A task with its data, as the harness's TaskDict. Those that the harness brings are loaded once.

    Raises ValueError with a sentence where that fails, for whatever reason; and what `check_task` raises.
    """
    return _load(name) if _is_file(name) else _load_registered(name)


@cache
def _load_registered(name: str) -> Any:
    return _load(name)


def _load(name: str) -> Any:
    manager, spec = _find(name)
    group = None if isinstance(spec, str) else spec.get("group")  # a group's file is not loaded by its path
    try:
        with _as_it_was(progress=False):
            loaded = manager.load([group or name])
    except Exception as error:  # tasks are programs: anything may come
        offline = isinstance(error, ConnectionError)
        hint = " Without a network, its data must be in the cache of 'datasets' before." if offline else ""
        raise ValueError(f"{PREFIX}{name} can't be loaded: {_first_line(error)}.{hint}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def run_task(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    *,
    documents: int,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run one task or group on one state of a model.

    Random states (Python's, NumPy's, PyTorch's of CPU and CUDA) and training flags are afterwards what they were, also
    after an error; the harness's draws are the same every time.

    Args:
        model: a causal LM of transformers, with or without PEFT's adapters. What it is now is measured.
        documents: at most so many of each task's documents, spread evenly over them.
        autocast: precision of the forward passes; log-probabilities are float32.
    Returns:
        "score": the task's main figure, the first that it reports (in its own unit); "metric": that figure's name;
        "better": "higher", "lower" or "" where the task doesn't say; "n": documents; "num_fewshot"; "version" of the
        task; "chat_template": whether one was applied; all figures of the harness by its own names ("acc,none",
        "acc_stderr,none", which is of the figure alone; "TASK/acc,none" for a group's tasks). Where the score is the
        mean over documents, "samples" holds each one's, so that two states can be compared in pairs.
    Raises:
        ValueError: the task can't be loaded or run, or gives no figure; and what `check_task` raises.
    """
    loaded = load_task(name)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    chat = getattr(tokenizer, "chat_template", None) is not None
    with _as_it_was(progress), measuring(model, autocast):
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        loaded_model: Any = _LoadedModel(model)
        harness_model = HFLM(
            loaded_model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it sets a pad token
            batch_size=8,
            mixed_precision_dtype=autocast,
            softmax_dtype="float32",
        )
        try:
            found: Any = evaluate(
                harness_model,
                loaded,
                samples={
                    task: evenly(range(len(content.eval_docs)), documents) for task, content in loaded["tasks"].items()
                },
                bootstrap_iters=RESAMPLES,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except AssertionError as error:  # so the harness tells what doesn't fit this model
            raise ValueError(f"{PREFIX}{name} can't be run on this model: {_first_line(error)}") from error
    return _result(name, next(iter(loaded.get("groups") or loaded["tasks"])), found) | {"chat_template": chat}


class _LoadedModel:
    """What the harness uses of a loaded model. Given the module, it would put it into eval mode for good and tie its
    weights anew."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = inner_model(model).config
        self.device = next(model.parameters()).device
        self.generate = model.generate

    def __call__(self, ids: torch.Tensor) -> Any:
        return self._model(input_ids=ids, use_cache=False)


class _Nowhere(io.TextIOBase):
    """Takes all that is written. Never closed, since libraries that are imported meanwhile keep it for their logs."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def _as_it_was(progress: bool) -> Iterator[None]:
    """Seeds and silences the harness; random states, log level and environment come back. With `progress` its bars are
    shown."""
    logger, python, numpy = logging.getLogger("lm_eval"), random.getstate(), np.random.get_state()
    level = logger.level
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, numpy)
        stack.callback(logger.setLevel, level)
        if "DISABLE_MULTIPROC" not in os.environ:  # its bootstrap would fork this process, with the model and threads
            os.environ["DISABLE_MULTIPROC"] = "1"
            stack.callback(os.environ.pop, "DISABLE_MULTIPROC")
        stack.enter_context(contextlib.redirect_stdout(_Nowhere()))
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(_Nowhere()))
        logger.setLevel(logging.ERROR)
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        yield


def _result(name: str, top: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's nested result as one flat probe; `top` is the task or group that was asked for."""
    figures = {
        (key if task == top else f"{task}/{key}"): float(value)
        for task, values in found["results"].items()
        for key, value in values.items()
        if "," in key and isinstance(value, Real)
    }
    metric = next((key for key in found["results"][top] if key in figures and "_stderr," not in key), None)
    if metric is None:
        raise ValueError(f"{PREFIX}{name} gives no number: {', '.join(found['results'][top])}.")
    plain, kept_by = metric.rsplit(",", 1)
    samples = [
        sample.get(plain) for task in found["samples"].values() for sample in task if sample["filter"] == kept_by
    ]
    better = found["higher_is_better"].get(top, {}).get(plain)
    result = {
        "score": figures[metric],
        "metric": metric,
        "better": {True: "higher", False: "lower", None: ""}[better],
        "n": sum(counts["effective"] for counts in found["n-samples"].values()),
        "num_fewshot": found["n-shot"].get(top),
        "version": found["versions"].get(top),
        **figures,
    }
    values = [float(sample) for sample in samples if isinstance(sample, Real)]
    if len(values) == len(samples) and math.isclose(statistics.fmean(values), figures[metric], abs_tol=1e-9):
        result["samples"] = {"score": values}
    return result


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
