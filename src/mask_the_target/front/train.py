"""`mtt train`: TRL's own SFT run, with TMKL as one more option.

Everything that TRL's `trl sft` reads from a YAML file or the command line means the same here. Our part is what comes
before the weights (checks that answer with a sentence), between tokenisation and the first step (supervised tokens,
labels inside the vocabulary), and around the loop (a bad loss stops the run, Ctrl-C leaves a checkpoint).
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback

from mask_the_target import TMKL

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PACKAGES = ("mask-the-target", "torch", "transformers", "peft", "trl", "datasets", "accelerate")
IGNORED = -100  # labels of this value carry no loss
# What a resumed run must not change: it would no longer be the run that the checkpoint belongs to.
FIXED_ON_RESUME = ("model", "data", "method", "seed", "lora")


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a whole step; the message says how to go on."""


class BadLossError(RuntimeError):
    """Loss or gradients became NaN or infinite; the message says where the batch was saved."""


# --------------------------------------------------------------------------------------------------------- options


@dataclass
class TMKLArguments:
    """Our options beside TRL's. `tmkl_*` are the fields of `mask_the_target.TMKL`."""

    method: Literal["tmkl", "ce"] = field(
        default="tmkl", metadata={"help": "tmkl: cross-entropy plus target-masked KL. ce: plain cross-entropy (TRL)."}
    )
    tmkl_weight: float = field(default=1.0, metadata={"help": "Factor of the KL."})
    tmkl_divergence: Literal["forward", "reverse", "jsd"] = field(
        default="forward", metadata={"help": "forward is KL(base || adapted)."}
    )
    tmkl_mask_target: bool = field(default=True, metadata={"help": "Remove the target from both distributions."})
    tmkl_renormalize: bool = field(default=True, metadata={"help": "Renormalise over the non-targets."})
    tmkl_position_weight: Literal["uniform", "non_target_mass"] = field(
        default="uniform", metadata={"help": "non_target_mass weighs each position by 1 - base probability of target."}
    )
    tmkl_temperature: float = field(default=1.0, metadata={"help": "Temperature of both; the KL is times its square."})
    tmkl_exclude_base_above: float | None = field(
        default=None, metadata={"help": "Leave out positions where the base gives the target more than this."}
    )
    tmkl_base: Literal["auto", "off", "initial"] = field(
        default="auto", metadata={"help": "Where the base comes from: adapter off, or a frozen initial adapter."}
    )

    def options(self) -> TMKL:
        """The same as a `TMKL`. Raises ValueError with a sentence on a bad value."""
        return TMKL(
            weight=self.tmkl_weight,
            divergence=self.tmkl_divergence,
            mask_target=self.tmkl_mask_target,
            renormalize=self.tmkl_renormalize,
            position_weight=self.tmkl_position_weight,
            temperature=self.tmkl_temperature,
            exclude_base_above=self.tmkl_exclude_base_above,
        )


@dataclass
class Settings:
    """One run: TRL's four option objects, ours, and the file they came from (None: command line only)."""

    script: Any
    training: Any
    model: Any
    mixture: Any
    tmkl: TMKLArguments
    config: str | None = None


def parse(argv: Sequence[str]) -> Settings:
    """Read `CONFIG.yaml` (first argument, optional) and `--key value` with TRL's parser, and check all of it.

    Raises ValueError or FileNotFoundError with a sentence for an unknown option, a bad value, or a combination that
    cannot work. Nothing is loaded.
    """
    try:
        from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
    except ImportError as error:
        raise ModuleNotFoundError(
            f"mtt train needs TRL and datasets ({error}). Install them with: pip install 'mask-the-target[train]'"
        ) from error

    args = list(argv)
    if args and not args[0].startswith("-"):
        args.insert(0, "--config")
    kinds: Any = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, TMKLArguments)
    parser = TrlParser(
        kinds,
        prog="mtt train",
        usage="mtt train [CONFIG.yaml] [--key value ...]",
        description="TRL's SFT options, and ours (method, tmkl_*), in a YAML file or on the command line.",
        allow_abbrev=False,
    )
    parser.set_defaults(use_peft=True, lora_target_modules=["all-linear"], use_cpu=not torch.accelerator.is_available())
    config = None
    if "--config" in args:
        position = args.index("--config") + 1
        if position >= len(args):
            raise ValueError("--config needs the path of a YAML file.")
        config = args[position]
        _check_config(parser, config)
    _check_flags(parser, args)
    script, training, model, mixture, tmkl = parser.parse_args_and_config(args)
    settings = Settings(script, training, model, mixture, tmkl, config)
    _check_settings(settings)
    return settings


def _unknown(name: str, known: Sequence[str], where: str) -> ValueError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Run 'mtt train --help' for all options."
    return ValueError(f"Unknown option {name!r} {where}. {hint}")


def _check_flags(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    known = list(parser._option_string_actions)
    for argument in args:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag not in known and flag != "--config":
            raise _unknown(flag, known, "on the command line")


def _check_config(parser: argparse.ArgumentParser, path: str) -> None:
    """The parser takes a YAML file's values as they are; here each is checked like one from the command line."""
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path!r}.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, but its content is {config!r:.80}.")
    actions = {action.dest: action for action in parser._actions}
    for key, value in config.items():
        if key == "env":
            continue
        if key not in actions:
            raise _unknown(str(key), list(actions), f"in {path}")
        action = actions[key]
        if value is None or isinstance(value, (list, dict)):
            continue
        quoted = " (YAML reads a bare no/yes/on/off as true or false: write it in quotes)" * isinstance(value, bool)
        converted: Any = value
        if callable(action.type):
            try:
                converted = action.type(str(value))
            except (ValueError, TypeError, KeyError, argparse.ArgumentTypeError):
                kind = getattr(action.type, "__name__", "value")
                kind = kind if kind in ("int", "float") else "bool" if "bool" in kind else "value"
                raise ValueError(f"{path}: {key}: {value!r} is not a valid {kind}{quoted}.") from None
        if action.choices is not None and converted not in action.choices:
            options = ", ".join(map(str, action.choices))
            raise ValueError(f"{path}: {key}: {value!r} is not one of: {options}{quoted}.")


def _check_settings(settings: Settings) -> None:
    training, model, script, tmkl = settings.training, settings.model, settings.script, settings.tmkl
    tmkl.options()
    if not model.use_peft:
        raise ValueError(
            "use_peft is false, which asks for a full fine-tune. TMKL takes its base distribution from the same model "
            "with the adapter off, so it needs an adapter: remove use_peft, or use TRL's own `trl sft`."
        )
    if tmkl.method == "tmkl" and training.label_smoothing_factor > 0:
        raise ValueError(
            f"label_smoothing_factor is {training.label_smoothing_factor}: smoothing replaces the loss that TMKL is "
            "part of, and its uniform pull works against keeping the base. Remove it, or set method: ce."
        )
    if tmkl.method == "tmkl" and getattr(training, "loss_type", None) == "dft":
        raise ValueError(
            "loss_type is 'dft', which reweighs every token's loss and so the KL in it. Use loss_type: nll, or "
            "set method: ce."
        )
    if getattr(training, "trust_remote_code", False) or getattr(model, "trust_remote_code", False):
        raise ValueError("trust_remote_code is true: mtt never runs code that came with a model. Remove it.")
    if not script.dataset_name and not settings.mixture.datasets:
        raise ValueError(
            "No data given. Set dataset_name to a local .jsonl, .json, .csv or .parquet file, a folder, a data set's "
            "name, or 'recipe:NAME' (recipe:arpabet, for one)."
        )


# ------------------------------------------------------------------------------------------------------------ data


@dataclass
class Data:
    """Rows to train on, rows to evaluate on if asked for, and what identifies them."""

    train: Dataset
    test: Dataset | None
    name: str
    fingerprint: str


def load_data(settings: Settings) -> Data:
    """Load what `dataset_name` (or TRL's `datasets` mixture) names, and check columns and rows.

    A split may be cut: `dataset_train_split: train[:2000]`. Raises ValueError or FileNotFoundError with a sentence.
    """
    script = settings.script
    if settings.mixture.datasets:
        from trl import get_dataset

        name, found = "mixture", get_dataset(settings.mixture)
    else:
        name = script.dataset_name
        found = load_named(name, script.dataset_config, script.dataset_streaming)
    train = take_split(found, script.dataset_train_split, name)
    evaluate = str(getattr(settings.training.eval_strategy, "value", settings.training.eval_strategy)) != "no"
    test = take_split(found, script.dataset_test_split, name) if evaluate else None
    for rows in (train, test):
        if rows is not None:
            check_columns(rows, settings.training.dataset_text_field, name)
    path = Path(name)
    fingerprint = (
        f"sha256:{_sha256(path)}" if path.is_file() else f"datasets:{getattr(train, '_fingerprint', 'stream')}"
    )
    return Data(train, test, name, fingerprint)


def load_named(name: str, config: str | None, streaming: bool) -> DatasetDict:
    from datasets import load_dataset, load_from_disk

    if name.startswith("recipe:"):
        from mask_the_target.front.recipes import RECIPES, load_recipe

        if name.removeprefix("recipe:") not in RECIPES:
            raise ValueError(f"Unknown recipe {name!r}. Known: {', '.join(f'recipe:{known}' for known in RECIPES)}.")
        return load_recipe(name.removeprefix("recipe:"))
    path = Path(name)
    kind = DATA_FILES.get(path.suffix.lower())
    if path.is_file():
        if kind is None:
            raise ValueError(f"{name} has the ending {path.suffix!r}; data files end in {', '.join(DATA_FILES)}.")
        if not path.stat().st_size:
            raise ValueError(f"The data file {name} is empty.")
    elif kind is not None and not path.is_dir():
        raise FileNotFoundError(f"There is no data file {name!r} (looked in {Path.cwd()}).")
    try:
        if path.is_file():
            return load_dataset(kind, data_files=name, streaming=streaming)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return load_from_disk(name)
        return load_dataset(name, config, streaming=streaming)
    except Exception as error:  # datasets raises many kinds, all of them about this one name
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"The data {name!r} cannot be read: {reason}") from error


def take_split(found: Any, wanted: str, name: str) -> Dataset:
    match = re.fullmatch(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?", wanted)
    if match is None:
        raise ValueError(f"Split {wanted!r} is not of the form 'train' or 'train[10:200]'.")
    split, start, stop = match.groups()
    if not isinstance(found, Mapping):
        found = {"train": found}
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(map(str, found))}.")
    rows = found[split]
    if not hasattr(rows, "__len__"):
        return rows
    if start is not None:
        rows = rows.select(range(int(start or 0), min(int(stop or len(rows)), len(rows))))
    if not len(rows):
        raise ValueError(f"The split {wanted!r} of {name} is empty: there is nothing to train or evaluate on.")
    return rows


def check_columns(rows: Dataset, text_field: str, name: str) -> None:
    """Refuse rows that TRL could not read: a column is missing, or a row has nothing in it (which row is said)."""
    columns = list(rows.column_names or next(iter(rows)))  # a stream may not know its columns
    if "input_ids" in columns:
        return
    if "prompt" in columns or "completion" in columns:
        needed = ["prompt", "completion"]
    else:
        needed = next(([column] for column in ("messages", "conversations", text_field) if column in columns), [])
    missing = [column for column in needed if column not in columns]
    if missing or not needed:
        what = (
            f"the column {missing[0]!r} is missing"
            if missing
            else f"it needs 'prompt' and 'completion', or 'messages', or {text_field!r}"
        )
        raise ValueError(f"{name}: {what}. Columns found: {', '.join(columns) or 'none'}.")
    if not hasattr(rows, "data"):
        return
    for column in needed:
        if rows.data.column(column).null_count:
            row = next((i for i, value in enumerate(rows[column]) if value is None), None)
            if row is not None:
                raise ValueError(f"{name}: row {row} has no {column!r} (rows are counted from 0).")


@dataclass(frozen=True)
class Supervision:
    """What the loss will see: documents, those of them without a supervised token, and supervised tokens."""

    documents: int
    unsupervised: int
    tokens: int


def check_labels(rows: Dataset, vocabulary: int, name: str = "the training data", dropped: int = 0) -> Supervision:
    """Count supervised tokens of tokenised rows (column `labels`, and `seq_lengths` where rows are packed).

    The first token of a document is nothing's target. `dropped`: documents that truncation left without a label and
    that are no longer among the rows. Raises ValueError if no document has a supervised token, or a label or an
    input id lies outside `range(vocabulary)` (the row is named, counted from 0).
    """
    documents = empty = tokens = done = 0
    for batch in rows.with_format("arrow").iter(1000):
        for column in ("labels", "input_ids"):
            if column not in batch.column_names:
                continue
            values, row, _ = _flat(batch[column])
            outside = ((values < 0) | (values >= vocabulary)) & ~((column == "labels") & (values == IGNORED))
            if outside.any():
                first = int(np.flatnonzero(outside)[0])
                what = "label" if column == "labels" else "input id"
                raise ValueError(
                    f"Row {done + int(row[first])} of {name} has the {what} {int(values[first])}, outside the model's "
                    f"vocabulary of {vocabulary} (0 to {vocabulary - 1}). Was it tokenised for another model?"
                )
        if "labels" in batch.column_names:
            packed = batch["seq_lengths"] if "seq_lengths" in batch.column_names else None
            values, document, count = _flat(batch["labels"], packed)
            supervised = (values != IGNORED) & (np.diff(document, prepend=-1) == 0)
            documents += count
            empty += int((np.bincount(document[supervised], minlength=count) == 0).sum())
            tokens += int(supervised.sum())
        done += batch.num_rows
    if tokens == 0 and documents + dropped:
        raise ValueError(
            f"None of the {documents + dropped} sequences of {name} has a supervised token, so there is nothing to "
            "learn. Are the completions empty, or does max_length cut them off?"
        )
    return Supervision(documents + dropped, empty + dropped, tokens)


def _flat(column: Any, lengths: Any = None) -> tuple[np.ndarray, np.ndarray, int]:
    """A list column's values [n], the row of each value [n], and the number of rows.

    With `lengths` (a list column: each row's documents) the same for documents instead of rows.
    """
    import pyarrow.compute as pc

    size = (pc.list_value_length(column) if lengths is None else pc.list_flatten(lengths)).to_numpy()
    return pc.list_flatten(column).to_numpy(), np.repeat(np.arange(len(size)), size), len(size)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- guards around the loop


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) lets the step end, saves a checkpoint and stops; the second acts at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: the caller handles signals
            self._previous.clear()

    def _handle(self, number: int, frame: Any) -> None:
        self.stopped = True
        print("\nStopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.", file=sys.stderr)
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()


def stop_on_bad_loss(trainer: Any) -> None:
    """Make `trainer` (any transformers Trainer) stop before the optimizer's step when loss or gradient is not finite.

    The batch is saved in `output_dir/bad_batch` (batch.safetensors and batch.json); weights and checkpoints stay as
    they were. Raises BadLossError out of `trainer.train()`. Trainer's own `logging_nan_inf_filter`, which writes an
    average into the log instead, is switched off, so that the check costs no further synchronisation.
    """
    trainer.args.logging_nan_inf_filter = False
    inner = trainer.training_step
    last: dict[str, Any] = {}

    def training_step(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        last.clear()
        last.update(inputs)
        loss = inner(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            raise _bad_batch(trainer, last, "loss", float(loss))
        return loss

    class CheckGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if getattr(trainer.accelerator, "scaler", None) is not None:
                return  # fp16: the scaler skips such steps itself
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None and p.requires_grad]
            if grads and not torch.isfinite(torch.stack(torch._foreach_norm(grads)).sum()):
                raise _bad_batch(trainer, last, "gradient", float("nan"))

    trainer.training_step = training_step
    trainer.add_callback(CheckGradients())


def _bad_batch(trainer: Any, batch: Mapping[str, Any], what: str, value: float) -> BadLossError:
    from safetensors.torch import save_file

    folder = Path(trainer.args.output_dir) / "bad_batch"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: v.detach().cpu().contiguous() for key, v in batch.items() if isinstance(v, torch.Tensor)}
    save_file(tensors, folder / "batch.safetensors")
    step = trainer.state.global_step
    write_json(
        folder / "batch.json",
        {
            "what": what,
            "value": str(value),
            "optimizer_steps_done": step,
            "epoch": trainer.state.epoch,
            "shapes": {key: list(tensor.shape) for key, tensor in tensors.items()},
            "other": {key: repr(v)[:500] for key, v in batch.items() if key not in tensors},
        },
    )
    checkpoint = last_checkpoint(Path(trainer.args.output_dir))
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been saved yet."
    return BadLossError(
        f"The {what} became {value} in step {step + 1}: training stopped before that step changed the weights. Its "
        f"batch is in {folder}. {kept} Try a lower learning rate, or look at the batch for broken rows."
    )


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest *whole* checkpoint: its trainer_state.json, which the Trainer writes last, can be read."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((folder / "trainer_state.json").read_text())["global_step"]), folder))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


def write_json(path: Path, value: Any) -> None:
    """Write all of it or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Installed versions of what a run's numbers depend on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "mask-the-target":
                found[package] = "not installed (run from source)"
    return found


# --------------------------------------------------------------------------------------------------------- the run


def run(settings: Settings, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, save a plain PEFT adapter with model card and run.json in output_dir, and return run.json's content.

    Raises Interrupted after a signal (a checkpoint is saved), BadLossError on a NaN or infinite loss, and ValueError
    or FileNotFoundError with a sentence for input that cannot work.
    """
    training = settings.training
    output = Path(training.output_dir)
    data = load_data(settings)
    path, vocabulary = _resolve(settings)
    if "labels" in (data.train.column_names or []) and hasattr(data.train, "__len__"):
        check_labels(data.train, vocabulary, data.name)
    record = _record(settings, data)
    resume = _resume(output, training.resume_from_checkpoint, record)

    from trl import SFTTrainer, get_peft_config, get_quantization_config

    model_init = {
        "revision": settings.model.model_revision,
        "attn_implementation": settings.model.attn_implementation,
        "dtype": settings.model.dtype,
    }
    training.model_init_kwargs = {**model_init, **(training.model_init_kwargs or {})}
    training.resume_from_checkpoint = str(resume) if resume else None
    stop = StopOnSignal()
    ours: list[TrainerCallback] = [*callbacks, stop]
    if settings.tmkl.method == "tmkl":
        from mask_the_target import TMKLCallback

        ours.append(TMKLCallback(settings.tmkl.options(), base=settings.tmkl.tmkl_base))
    trainer = SFTTrainer(
        model=path,
        args=training,
        train_dataset=data.train,
        eval_dataset=data.test,
        quantization_config=get_quantization_config(settings.model),
        peft_config=get_peft_config(settings.model),
        callbacks=ours,
    )
    record["supervision"] = _check_tokenised(trainer, data)
    stop_on_bad_loss(trainer)
    main_process = trainer.is_world_process_zero()
    if main_process:
        write_json(output / "run.json", record)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        stop.restore()
        record["seconds"] += time.monotonic() - started
        record["log_history"] = trainer.state.log_history
        if main_process:
            write_json(output / "run.json", record)
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        again = f"mtt train {settings.config or ''} --resume_from_checkpoint last".replace("  ", " ")
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is in "
            f"{output}. Go on with: {again} (and the other options as before)."
        )
    trainer.save_model(str(output))
    record |= {"status": "complete", "steps": trainer.state.global_step, "metrics": _metrics(trainer)}
    if main_process:
        (output / "README.md").write_text(model_card(record), encoding="utf-8")
        write_json(output / "run.json", record)
    return record


def _resolve(settings: Settings) -> tuple[str, int]:
    """The model's folder or hub name, and its vocabulary, from the config alone: no weights are read."""
    from transformers import AutoConfig

    from mask_the_target.front.backbones import DEFAULT_MODEL, resolve_model

    name = settings.model.model_name_or_path or DEFAULT_MODEL
    settings.model.model_name_or_path = name
    path = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(path, revision=settings.model.model_revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The model {name!r} cannot be found or read: {reason}") from error
    return path, int(config.get_text_config().vocab_size)


def _check_tokenised(trainer: Any, data: Data) -> dict[str, int]:
    rows: Any = trainer.train_dataset
    if not hasattr(rows, "__len__") or "labels" not in rows.column_names:
        return {}  # streamed, or prepared on the fly: nothing to count yet
    packed = "seq_lengths" in rows.column_names
    before = len(data.train)
    head = trainer.model.get_output_embeddings()
    vocabulary = head.weight.shape[0] if head is not None else trainer.model.config.get_text_config().vocab_size
    found = check_labels(rows, vocabulary, dropped=0 if packed else before - len(rows))
    if found.unsupervised:
        print(
            f"Note: {found.unsupervised} of {found.documents} sequences have no supervised token (an empty completion, "
            "or one cut off by max_length); they teach nothing.",
            file=sys.stderr,
        )
    return asdict(found)


def _record(settings: Settings, data: Data) -> dict[str, Any]:
    """run.json before the first step. `seconds` counts the training time of all parts of a resumed run."""
    training, model = settings.training, settings.model
    options = training.to_dict()  # hides tokens
    tmkl = asdict(settings.tmkl)
    return {
        "status": "running",
        "model": model.model_name_or_path,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "split": settings.script.dataset_train_split},
        "method": tmkl if settings.tmkl.method == "tmkl" else {"method": "ce"},
        "seed": training.seed,
        "lora": {key: value for key, value in asdict(model).items() if key.startswith(("lora_", "use_"))},
        "options": {"training": options, "model": asdict(model), "data": asdict(settings.script)},
        "versions": versions(),
        "device": str(training.device),
        "seconds": 0.0,
        "supervision": {},
        "metrics": {},
        "log_history": [],
    }


def _resume(output: Path, wanted: str | bool | None, record: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from. Refuses to mix two runs in one folder, and to go on with other settings."""
    newest = last_checkpoint(output) if output.is_dir() else None
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        if newest is not None or (output / "adapter_config.json").exists():
            raise ValueError(
                f"{output} already holds a run. Add --resume_from_checkpoint last to go on with it, or choose "
                "another --output_dir."
            )
        return None
    if str(wanted).lower() in ("true", "last"):
        if newest is None:
            raise ValueError(f"There is no whole checkpoint in {output} to resume from. Leave the option out to start.")
        checkpoint = newest
    else:
        checkpoint = Path(str(wanted))
        if not (checkpoint / "trainer_state.json").is_file():
            raise FileNotFoundError(f"{checkpoint} is not a whole checkpoint: it has no trainer_state.json.")
    try:
        before = json.loads((checkpoint.parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return checkpoint  # made by TRL itself
    for key in FIXED_ON_RESUME:
        now, then = json.loads(json.dumps(record[key], default=str)), before.get(key)
        if now != then:
            raise ValueError(
                f"This run differs from the one in {checkpoint.parent}: {_difference(key, then, now)}. Go on with the "
                "same settings, or choose another --output_dir."
            )
    record["seconds"] = float(before.get("seconds", 0.0))
    return checkpoint


def _difference(key: str, then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        key = next(name for name in now | then if now.get(name) != then.get(name))
        then, now = then.get(key), now.get(key)
    return f"{key} was {then!r} and is now {now!r}"


def _metrics(trainer: Any) -> dict[str, float]:
    """The last value of each of the main figures that were logged."""
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        found |= {k: v for k, v in entry.items() if k in ("loss", "ce", "kl", "eval_loss", "train_runtime")}
    return found


def model_card(record: Mapping[str, Any], measured: str = "") -> str:
    """README.md of an adapter. `measured`: a Markdown table of what was learned and kept, where that is known."""
    method = record["method"]
    name = "target-masked KL (TMKL)" if method["method"] == "tmkl" else "plain cross-entropy"
    options = ", ".join(f"{key.removeprefix('tmkl_')} {value}" for key, value in method.items() if key != "method")
    lora = record["lora"]
    figures = ", ".join(f"{key} {value:.4g}" for key, value in record["metrics"].items() if key != "train_runtime")
    base = str(record["model"])
    hub = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()
    front = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags: [lora, peft, trl, tmkl]"]
    front += [f"base_model: {base}"] if hub else []
    kept = measured or (
        "Not measured here. `mtt eval --model BASE --adapter THIS_FOLDER` measures what was learned and what was kept, "
        "base and adapted in one load."
    )
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# LoRA adapter for `{base}`, trained with {name}",
            "",
            f"- Base model: `{base}`",
            f"- Data: `{record['data']['name']}` ({record['data']['fingerprint']}), split {record['data']['split']}",
            f"- Method: {name}" + (f" with {options}" if options else ""),
            f"- LoRA: rank {lora['lora_r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}, "
            f"modules {lora['lora_target_modules']}",
            f"- Steps: {record['steps']}, seed {record['seed']}" + (f"; last logged: {figures}" if figures else ""),
            "- Versions: " + ", ".join(f"{key} {value}" for key, value in record["versions"].items()),
            "",
            "All options are in `run.json`.",
            "",
            "## What was learned and kept",
            "",
            kept,
            "",
            "## Use",
            "",
            "A plain PEFT adapter; nothing else is needed to load it:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base!r})"
            if not base.startswith("package:")
            else f"from mask_the_target.front.backbones import resolve_model\n\n"
            f"base = AutoModelForCausalLM.from_pretrained(resolve_model({base!r}))",
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
            "```",
            "",
            "Method: Xu, Garg, Saratchandran, Lucey, *Mask the Target: A Plug-and-Play Regularizer Against LoRA "
            "Forgetting*, [arXiv 2605.29498](https://arxiv.org/abs/2605.29498)."
            if method["method"] == "tmkl"
            else "The plain baseline of *Mask the Target: A Plug-and-Play Regularizer Against LoRA Forgetting*, "
            "[arXiv 2605.29498](https://arxiv.org/abs/2605.29498).",
            "",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """The command `mtt train`."""
    settings = parse(argv)
    record = run(settings)
    output = settings.training.output_dir
    print(f"Saved the adapter, its model card (README.md) and run.json in {output} ({record['seconds']:.0f} s).")
    print(f"Measure it: mtt eval --model {record['model']} --adapter {output}")
    return 0
