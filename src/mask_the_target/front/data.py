"""The data of `mtt train` and `mtt eval`: loaded from where its name points to, and checked.

Columns and rows are checked before weights are read (`check_columns`), tokens before the first step (`check_labels`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mask_the_target.front.probes import evenly
from mask_the_target.objective import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from mask_the_target.front.options import Settings

DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class Data:
    """Rows to train on, rows to evaluate on if asked for, what identifies them, and held-out rows to log drift on."""

    train: Dataset
    test: Dataset | None
    name: str
    fingerprint: str
    drift: list[dict[str, Any]] = field(default_factory=list)


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
    test = None
    if settings.training.eval_strategy != "no":
        test = take_split(found, script.dataset_test_split, name)
    for rows in (train, test):
        if rows is not None:
            check_columns(rows, settings.training.dataset_text_field, name)
    if Path(name).is_file():
        fingerprint = f"sha256:{_sha256(Path(name))}"
    else:
        fingerprint = f"datasets:{getattr(train, '_fingerprint', 'stream')}"
    return Data(train, test, name, fingerprint, _drift_rows(settings, found, name))


def _drift_rows(settings: Settings, found: Any, name: str) -> list[dict[str, Any]]:
    count, split = settings.tmkl.drift_rows, settings.script.dataset_test_split
    if not count:
        return []
    rows = take_split(found, split, name)
    if not {"prompt", "completion"} <= set(rows.column_names or ()) or not hasattr(rows, "__len__"):
        raise ValueError(
            f"drift_rows is {count}: drift is logged on held-out rows with 'prompt' and 'completion' that are not "
            f"streamed, and the split {split!r} of {name} has none. Leave it out, or give such data."
        )
    return evenly(list(rows), count)


def load_named(name: str, config: str | None, streaming: bool) -> DatasetDict:
    """The splits that a recipe, a data file, a folder or a data set's name holds. Raises as `load_data` does."""
    from datasets import load_dataset, load_from_disk

    if name.startswith("recipe:"):
        from mask_the_target.front.recipes import RECIPES, load_recipe

        recipe = name.removeprefix("recipe:")
        if recipe not in RECIPES:
            raise ValueError(f"Unknown recipe {name!r}. Known: {', '.join(f'recipe:{known}' for known in RECIPES)}.")
        return load_recipe(recipe)
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


def split_parts(wanted: str) -> tuple[str, int | None, int | None]:
    """Name, start and stop of a split like "train" or "train[10:200]". Raises ValueError with a sentence."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?", wanted)
    if match is None:
        raise ValueError(f"Split {wanted!r} is not of the form 'train' or 'train[10:200]'.")
    split, start, stop = match.groups()
    return split, int(start) if start else None, int(stop) if stop else None


def take_split(found: Any, wanted: str, name: str) -> Dataset:
    """The rows of a split, or of a part of it: "train", "train[10:200]". Raises ValueError with a sentence."""
    split, start, stop = split_parts(wanted)
    cut = wanted != split
    if not isinstance(found, Mapping):
        found = {"train": found}
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(map(str, found))}.")
    rows = found[split]
    if not hasattr(rows, "__len__"):
        if cut:
            raise ValueError(
                f"{wanted!r} is a part of a split, which streaming can't cut. Set dataset_streaming: false."
            )
        return rows
    if cut:
        rows = rows.select(range(start or 0, len(rows) if stop is None else min(stop, len(rows))))
    if not len(rows):
        raise ValueError(f"The split {wanted!r} of {name} is empty: there is nothing to train or evaluate on.")
    return rows


def column_names(rows: Dataset) -> list[str]:
    """Also of a stream, which may not know them before its first row."""
    return list(rows.column_names or next(iter(rows)))


def check_columns(rows: Dataset, text_field: str, name: str) -> None:
    """Refuse rows that TRL could not read: a column is missing, or a row has nothing in it (which row is said)."""
    columns = column_names(rows)
    if "input_ids" in columns:
        return
    if "prompt" in columns or "completion" in columns:
        needed = ["prompt", "completion"]
    else:
        needed = next(([column] for column in ("messages", "conversations", text_field) if column in columns), [])
    missing = [column for column in needed if column not in columns]
    if missing or not needed:
        what = f"it needs 'prompt' and 'completion', or 'messages', or {text_field!r}"
        if missing:
            what = f"the column {missing[0]!r} is missing"
        raise ValueError(f"{name}: {what}. Columns found: {', '.join(columns) or 'none'}.")
    if not hasattr(rows, "data"):
        return
    for column in needed:
        if rows.data.column(column).null_count:
            row = next((i for i, value in enumerate(rows[column]) if value is None), None)
            if row is not None:
                raise ValueError(f"{name}: row {row} has no {column!r} (rows are counted from 0).")


def has_context(rows: Dataset, options: Mapping[str, Any]) -> bool:
    """Whether TRL leaves tokens of these rows without a target, by their columns and its options: prompts, or all but
    the assistant's turns. Rows that are tokenised already may; whether they do is counted later."""
    columns = set(column_names(rows))
    if columns & {"labels", "completion_mask", "assistant_masks"} or options.get("assistant_only_loss"):
        return True
    return "prompt" in columns and options.get("completion_only_loss") is not False


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
            outside = ((values < 0) | (values >= vocabulary)) & ~((column == "labels") & (values == IGNORE_INDEX))
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
            supervised = (values != IGNORE_INDEX) & (np.diff(document, prepend=-1) == 0)
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
