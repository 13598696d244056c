"""Data sets by name in a study: prompt-completion rows, or columns of text as language modelling takes them.

Text is measured as in "Mask the Target": concatenated, tokenised, packed into windows of one length, cross-entropy at
every position, averaged over all of them. The target and what is kept go through the same code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from mask_the_target.files import write_whole
from mask_the_target.front.data import load_named, split_parts
from mask_the_target.front.probes import TextLoss, measuring

# Keys of a data set in a study file. `text` names the columns that make a document, a blank line between them.
KEYS = ("dataset_name", "dataset_config", "text", "train", "test")
SEPARATOR = "\n\n"  # between the documents of a text that is only measured


def training_data(recipe: str, data: Mapping[str, Any] | None, folder: Path) -> dict[str, Any]:
    """The options of mtt train for an adaptation set: a recipe of ours (`data` None), or a data set by name.

    Columns of text are read once and kept in `folder`. Raises what `text_file` raises.
    """
    if data is None:
        return {"dataset_name": f"recipe:{recipe}"}
    if data.get("text"):
        return {"dataset_name": str(text_file(recipe, data, "train", folder)), "dataset_train_split": "train"}
    named = {key: data[key] for key in ("dataset_name", "dataset_config") if data.get(key)}
    return named | {"dataset_train_split": data.get("train", "train")}


def held_out(recipe: str, data: Mapping[str, Any] | None, folder: Path) -> list[Any]:
    """What was learned is measured on these: prompt-completion rows, or documents (str) of a set of text.

    Raises ValueError or FileNotFoundError with a sentence if the data can't be read.
    """
    from mask_the_target.cli import held_out_rows
    from mask_the_target.front.recipes import recipe_rows

    if data is None:
        return recipe_rows(recipe)["test"]
    if data.get("text"):
        return documents(recipe, data, "test", folder)
    return held_out_rows(data["dataset_name"], data.get("test", "test"), data.get("dataset_config"))


def text_file(name: str, data: Mapping[str, Any], part: str, folder: Path) -> Path:
    """A .jsonl file in `folder` with the documents of a part ("train" or "test") of a data set, as rows {"text": ...}.

    The part's split may be cut, "train[10:200]", which counts rows; rows without text are left out afterwards. The
    data set is streamed, so that no more of it is fetched than is needed. Raises ValueError with a sentence for a split
    or column that it doesn't have, or if there is no text.
    """
    from filelock import FileLock

    split = data.get(part, part)
    shared = [data["dataset_name"], data.get("dataset_config"), data["text"], split]
    digest = hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:10]
    file = folder / f"{name}-{digest}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            rows = [json.dumps({"text": text}, ensure_ascii=False) for text in _read(data, split)]
            if not rows:
                raise ValueError(f"The split {split!r} of {data['dataset_name']} holds no text in {data['text']}.")
            write_whole(file, ("\n".join(rows) + "\n").encode())
    return file


def documents(name: str, data: Mapping[str, Any], part: str, folder: Path) -> list[str]:
    """The documents of `text_file`."""
    lines = text_file(name, data, part, folder).read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


def _read(data: Mapping[str, Any], wanted: str) -> Iterator[str]:
    name, columns = data["dataset_name"], data["text"]
    split, start, stop = split_parts(wanted)
    found: Any = load_named(name, data.get("dataset_config"), True)
    found = found if isinstance(found, Mapping) else {"train": found}
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(map(str, found))}.")
    for row in itertools.islice(found[split], start, stop):
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(f"{name}: the column {missing[0]!r} is missing. Columns found: {', '.join(row)}.")
        text = SEPARATOR.join(str(row[column]) for column in columns if row[column])
        if text.strip():
            yield text


def packed_windows(tokenizer: Any, texts: Sequence[str], separator: str, length: int) -> list[list[int]]:
    """The texts, each followed by `separator`, as one sequence of tokens, cut into windows of `length` tokens.

    The rest that fills no window is left out, unless there is no other. Raises ValueError for fewer than two tokens.
    """
    ids = tokenizer("".join(text + separator for text in texts), verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"{len(texts)} documents have {len(ids)} tokens: there is nothing to predict.")
    whole = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return whole or [ids]


def packed_loss(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    separator: str = SEPARATOR,
    length: int = 1024,
    limit: int | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> TextLoss:
    """Mean loss over all positions of packed windows of `length` tokens, nats per token; the first of each window is
    nothing's target. `limit`: that many windows, spread evenly over the text.
    """
    windows = packed_windows(tokenizer, texts, separator, length)
    count = min(limit or len(windows), len(windows))
    chosen = [windows[place * len(windows) // count] for place in range(count)]
    losses: list[float] = []
    device = next(model.parameters()).device
    with measuring(model, autocast):
        for window in tqdm(chosen, desc="packed text", disable=not progress):
            ids = torch.tensor([window], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses.append(F.cross_entropy(logits, ids[0, 1:]).item())
    return TextLoss(sum(losses) / len(losses), losses, sum(len(window) - 1 for window in chosen))
