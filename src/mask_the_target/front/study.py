"""A study file: many runs, each to be trained and measured once by `mtt sweep`.

A study is one YAML file:

    name: arpabet
    model: package:smollm2
    recipes: [arpabet]
    probes: [target, text, drift]     # and any task of lm-evaluation-harness: lm_eval:hellaswag
    probes_at_end: [facts, instructions]   # these after training only, which costs less
    sizes: quick                      # or full; tiny, to try a file; or every field of evaluate.ProbeSizes
    methods:                          # options of mtt train; those in grid take each of their values
      ce: {method: ce, grid: {learning_rate: [5.0e-4, 1.0e-3]}}
      tmkl: {method: tmkl, learning_rate: 1.0e-3, grid: {tmkl_weight: [0.3, 1.0, 3.0]}}
    seeds: [0, 1, 2]
    checkpoints: [0.25, 0.5, 1.0]     # measured at these fractions of the run, its end always
    scales: [0.5, 0.75]               # and its end with the adapter scaled down, which costs no training
    train: {max_steps: 160, per_device_train_batch_size: 8}   # options of mtt train for all methods
    # search: true and trials: 30: Optuna's sampler chooses settings between the grid's lowest and highest value

Data sets other than our recipes are named in the file, and then used like a recipe or a text probe:

    data:
      mine: {dataset_name: answers.jsonl, train: "train[200:]", test: "train[:200]"}   # what mtt train takes
      maths: {dataset_name: open-r1/OpenR1-Math-220k, text: [problem, solution], train: "train[:3000]", ...}
    texts:
      wikitext: {dataset_name: Salesforce/wikitext, dataset_config: wikitext-103-raw-v1, text: [text], test: validation}
    recipes: [arpabet, mine]
    probes: [target, "text:wikitext"]

With `text`, the named columns are one document, and the set is packed text: what is measured is the loss at every
position of windows of max_length tokens. `paper` holds published numbers to print beside ours (see `paper`).
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mask_the_target.files import write_whole

# Options of mtt train that the study sets itself, and what to set instead.
RESERVED = {
    "model_name_or_path": "model",
    "dataset_name": "recipes (and data)",
    "dataset_config": "data",
    "seed": "seeds",
    "output_dir": "--output",
    "resume_from_checkpoint": "nothing: a stopped trial goes on by itself",
    "save_total_limit": "nothing: the checkpoints are measured",
    "save_only_model": "nothing: a stopped trial goes on from its checkpoints",
}
# One process runs trials of several methods, and accelerate allows it one precision.
FOR_ALL = ("bf16", "fp16", "use_cpu", "dtype")
# What can't be measured of an adapter, and why.
AT_ITS_END = (
    "Measured at its end only: PiSSA moves a part of the base's weights into the adapter. What is saved at the end is "
    "converted to an adapter of the base; its checkpoints aren't."
)
NOT_SCALED = (
    "Not measured at other scales: PEFT can't rescale this adapter, or not all of it (DoRA's magnitude, layers trained "
    "whole)."
)


@dataclass(frozen=True)
class Trial:
    """One run: what is trained, and how it is measured. `setting` are those of its options that its method's grid
    varies; `ranges` are left to the sampler (search). `data` is the adaptation set where it is no recipe of ours, and
    `texts` those of the probes that are data sets. `notes` say what of the study is not measured here, and why. `key`
    is the same for the same trial on every machine."""

    key: str
    recipe: str
    method: str
    setting: dict[str, Any]
    seed: int
    model: str
    options: dict[str, Any]
    probes: list[str]
    probes_at_end: list[str]
    sizes: str | dict[str, int]
    checkpoints: list[float]
    scales: list[float]
    ranges: dict[str, list[Any]]
    data: dict[str, Any] | None = None
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """A study file, checked. `methods`: {name: (fixed options, grid)}."""

    name: str
    model: str
    recipes: list[str]
    methods: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]]
    train: dict[str, Any]
    probes: list[str]
    probes_at_end: list[str] = field(default_factory=list)
    sizes: str | dict[str, int] = "quick"
    seeds: tuple[int, ...] = (0, 1, 2)
    checkpoints: tuple[float, ...] = (0.25, 0.5, 1.0)
    scales: tuple[float, ...] = (0.5, 0.75)
    search: bool = False
    trials: int | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)

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
            options = {**self.train, **fixed, **varied}
            checkpoints, scales, notes = measured_at(options, self.checkpoints, self.scales)
            trial = Trial(
                key="",
                recipe=recipe,
                method=method,
                setting=varied,
                seed=seed,
                model=self.model,
                options=options,
                probes=self.probes,
                probes_at_end=self.probes_at_end,
                sizes=self.sizes,
                checkpoints=checkpoints,
                scales=scales,
                ranges=grid if self.search else {},
                data=self.data.get(recipe),
                texts={f"text:{name}": found for name, found in self.texts.items() if f"text:{name}" in self.probes},
            )
            text = json.dumps([asdict(trial), setting], sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:10]
            yield replace(trial, key=f"{recipe}-{method}-seed{seed}-{digest}", notes=notes)


def measured_at(
    options: Mapping[str, Any], checkpoints: Sequence[float], scales: Sequence[float]
) -> tuple[list[float], list[float], list[str]]:
    """The checkpoints and scales at which a run with these options can be measured, and notes on what is left out.

    Scaled down is what at a scale of 0 would be the base. With DoRA's magnitude more than half of the distance stays.
    """
    adapter = options.get("adapter")
    unscaled = adapter in ("dora", "vera", "randlora") or options.get("use_dora") or options.get("lora_modules_to_save")
    if adapter == "pissa" and set(checkpoints) != {1.0}:
        return [1.0], list(scales), [AT_ITS_END]
    if unscaled and set(scales) - {1.0}:
        return list(checkpoints), [], [NOT_SCALED]
    return list(checkpoints), list(scales), []


def read_study(path: Path, changes: Sequence[str] = (), methods: Sequence[str] | None = None) -> Study:
    """Read and check a study file. Nothing is loaded: no data, no model.

    Args:
        changes: `KEY=VALUE` each, which replace what the file says, before it is checked: dotted keys
            ("train.max_steps=2"), values as YAML; `KEY=null` removes.
        methods: the names of those to keep; default: all.
    Raises:
        FileNotFoundError or ValueError with a sentence that names the place, and the nearest valid name.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"There is no study file {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, but its content is {content!r:.80}.")
    change(content, changes)
    if methods is not None and isinstance(content.get("methods"), dict):
        for name in methods:
            check_known(name, [str(known) for known in content["methods"]], "method", f"{path}: methods")
        content["methods"] = {name: content["methods"][name] for name in methods}
    return check_study(content, path)


def change(content: dict[str, Any], changes: Sequence[str]) -> None:
    """Replace values of a study's content; see `read_study`. Raises ValueError with a sentence."""
    import yaml

    for text in changes:
        place, equals, value = text.partition("=")
        if not place or not equals:
            raise ValueError(f"--set {text!r} is not of the form KEY=VALUE, for example train.max_steps=2.")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {place}: {value!r} is not valid YAML: {error}") from error
        *above, last = place.split(".")
        at: Any = content
        for key in above:
            at = at.setdefault(key, {}) if isinstance(at, dict) else None
        if not isinstance(at, dict):
            raise ValueError(f"--set {place}: {'.'.join(above)} holds no keys, so none of them can be set.")
        if read is None:
            at.pop(last, None)
        else:
            at[last] = read


def check_study(content: Mapping[str, Any], path: Path) -> Study:
    """The content of a study file, checked; `path` is named in errors. Raises as `read_study`."""
    from mask_the_target.front.evaluate import PROBES, SIZES, check_probes, probe_sizes
    from mask_the_target.front.paper import check_paper
    from mask_the_target.front.recipes import RECIPES

    known = [each.name for each in fields(Study)]
    for key in content:
        check_known(str(key), known, "key", str(path))
    for key in ("name", "model", "recipes", "methods", "train", "probes"):
        if not content.get(key):
            raise ValueError(f"{path}: {key} is missing or empty.")
    for key in ("name", "model"):
        _require(isinstance(content[key], str), path, key, content[key], "must be a name")
    _require(_is_plain(content["name"]), path, "name", content["name"], "may hold letters, digits and ._+-")

    given: dict[str, Any] = dict(content)
    given["data"] = _read_sets(path, "data", content.get("data", {}), list(RECIPES))
    given["texts"] = _read_sets(path, "texts", content.get("texts", {}), [p[5:] for p in PROBES if p[:5] == "text:"])
    of_data = [f"text:{name}" for name in given["texts"]]
    _check_list(path, "recipes", content["recipes"])
    for name in map(str, content["recipes"]):
        check_known(name, [*RECIPES, *given["data"]], "recipe", f"{path}: recipes")
    for key in ("probes", "probes_at_end"):
        _check_list(path, key, content.get(key, []), may_be_empty=key == "probes_at_end")
        names = [str(name) for name in content.get(key, [])]
        for name in names:
            if name.startswith("text:"):
                check_known(name, [*PROBES, *of_data], "probe", f"{path}: {key}")
        try:
            spelled = [[name] if name in of_data else check_probes([name]) for name in names]
        except ValueError as error:
            raise ValueError(f"{path}: {key}: {error}") from error
        given[key] = list(dict.fromkeys(itertools.chain.from_iterable(spelled)))
    for name in given["probes_at_end"]:
        if name in given["probes"] or name == "target" or name.startswith("text:"):
            why = "is in probes too" if name in given["probes"] else "is measured at every point: put it into probes"
            raise ValueError(f"{path}: probes_at_end: {name!r} {why}.")
    measured = [*given["probes"], *given["probes_at_end"]]
    for name in content["recipes"]:
        if "drift" in measured and given["data"].get(name, {}).get("text"):
            raise ValueError(f"{path}: the probe 'drift' needs prompt-completion rows, and {name} is text. Remove it.")
    for needed in ("target", "text"):
        if not any(probe.split(":")[0] == needed for probe in given["probes"]):
            raise ValueError(f"{path}: probes lacks {needed!r}: a front needs what was learned and what was kept.")
    sizes = content.get("sizes", "quick")
    if not isinstance(sizes, dict):
        check_known(str(sizes), list(SIZES), "size", f"{path}: sizes")
    try:
        probe_sizes(sizes)
    except ValueError as error:
        raise ValueError(f"{path}: sizes: {error}") from error
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
    check_paper(content.get("paper", {}), str(path))
    study = Study(**given)
    _check_options(path, study)
    return study


def _read_sets(path: Path, key: str, sets: Any, taken: Sequence[str]) -> dict[str, dict[str, Any]]:
    from mask_the_target.front.data import split_parts
    from mask_the_target.front.texts import KEYS

    if not isinstance(sets, dict):
        raise ValueError(f"{path}: {key} must hold 'name: {{dataset_name: ...}}', but is {sets!r:.80}.")
    for name, found in sets.items():
        where = f"{key}.{name}"
        _require(_is_plain(name), path, key, name, "may hold letters, digits and ._+-")
        if name in taken:
            raise ValueError(f"{path}: {where} has the name of one that is built in. Choose another.")
        if not isinstance(found, dict) or not found.get("dataset_name"):
            raise ValueError(f"{path}: {where} needs a dataset_name, but is {found!r:.80}.")
        for option, value in found.items():
            check_known(str(option), KEYS, "key", f"{path}: {where}")
            if option == "text":
                _check_list(path, f"{where}.text", value)
            else:
                _require(isinstance(value, str), path, f"{where}.{option}", value, "must be a name")
            if option in ("train", "test"):
                try:
                    split_parts(value)
                except ValueError as error:
                    raise ValueError(f"{path}: {where}.{option}: {error}") from error
        if key == "texts" and not found.get("text"):
            raise ValueError(f"{path}: {where} needs text, the columns that hold it, for example [text].")
    return sets


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
    known = [each.name for kind in kinds for each in fields(kind)]
    places = {"train": study.train}
    for name, (fixed, grid) in study.methods.items():
        places |= {f"methods.{name}": fixed, f"methods.{name}.grid": grid}
    for where, options in places.items():
        for key in options:
            if key in RESERVED:
                raise ValueError(f"{path}: {where} sets {key}, which the study sets. Use {RESERVED[key]}.")
            check_known(str(key), known, "option", f"{path}: {where}")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        for name, (fixed, grid) in study.methods.items():
            for values in itertools.product(*grid.values()):
                options = {**study.train, **fixed, **dict(zip(grid, values, strict=True))}
                data = {"dataset_name": study.recipes[0]}
                write_config(config, study.model, data, study.seeds[0], options, Path(folder))
                try:
                    settings = parse([str(config)])
                except ValueError as error:
                    where, message = f"{path}: methods.{name}", str(error).replace(f"{config}: ", "")
                    raise ValueError(f"{where}: {message}") from error
                if settings.tmkl.method == "tmkl" and not any(key.startswith("tmkl_") for key in options):
                    raise ValueError(
                        f"{path}: methods.{name} is tmkl without any tmkl_* option, which mtt train gives its "
                        "recommended weights, and a study must say which. The paper's is tmkl_weight: 1.0."
                    )
                notes = measured_at(options, study.checkpoints, study.scales)[2]
                if study.search and "adapter" in grid and notes:
                    raise ValueError(
                        f"{path}: methods.{name} searches over adapters, and {settings.tmkl.adapter} is not measured "
                        "as the others are. Give it a method of its own."
                    )


def write_config(
    file: Path, model: str, data: Mapping[str, Any], seed: int, options: Mapping[str, Any], output: Path
) -> None:
    import yaml

    settings = {
        "model_name_or_path": model,
        **data,
        "output_dir": str(output),
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,  # the study has one bar
        **options,
    }
    write_whole(file, yaml.safe_dump(settings, sort_keys=False).encode())


def check_known(name: str, known: Sequence[str], kind: str, where: str) -> None:
    """Raises ValueError, with the place and the nearest valid name, if `name` is not among those that are `known`."""
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
