"""Anchors that the base writes itself, for data without prompts and for more than prompts: short sequences without a
target, at whose positions the full KL of ``context_weight`` holds the model in place. No data but the user's own.

Not in the paper. An aligned model writes the user's turn too when it is given its template with that turn left open.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from mask_the_target.base import Base
from mask_the_target.files import write_whole
from mask_the_target.head import evaluating
from mask_the_target.objective import IGNORE_INDEX
from mask_the_target.sharding import is_sharded

QUESTION_TOKENS = 32  # of a user's turn
ROUNDS = 4  # times as many sequences are written, at most, until there are enough different ones
REMEDY = "Use a collator that keeps the rows' labels (TRL's, or DataCollatorForSeq2Seq), with labels in the data."
_OPEN = "\ue000"  # stands where the user's turn is left open
# What a row of tokenised data may hold, and what an anchor has there.
_FEATURES: dict[str, Callable[[list[int]], list[int]]] = {
    "input_ids": list,
    "labels": lambda ids: [IGNORE_INDEX] * len(ids),
    "attention_mask": lambda ids: [1] * len(ids),
    "completion_mask": lambda ids: [0] * len(ids),
    "assistant_masks": lambda ids: [0] * len(ids),
    "position_ids": lambda ids: list(range(len(ids))),
    "seq_lengths": lambda ids: [len(ids)],
}


@dataclass(frozen=True)
class Anchors:
    """Sequences that are added to each training batch; they have no target, so only ``context_weight`` acts on them.

    Attributes:
        source: ``"auto"``: the base writes them before training, into the run's folder (``anchors-*.jsonl``), where a
            resumed run finds them. Or a file of JSON Lines: what ``mtt anchors`` wrote, or rows with ``text``,
            ``messages`` or ``prompt`` and ``completion``. With data of your own it is replay, and no longer free of it.
        share: of a batch's tokens that are anchors, on average, in (0, 1).
        count: how many ``"auto"`` writes.
        length: tokens of each, at most, a user's turn not counted.
        seed: of what is written, and of which are added to which batch.
    """

    source: str | Path = "auto"
    share: float = 0.25
    count: int = 512
    length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.share, (int, float)) or not 0 < self.share < 1:
            raise ValueError(f"Anchors: share={self.share!r} must lie between 0 and 1: a part of a batch's tokens.")
        for name in ("count", "length"):
            if getattr(self, name) < 2:
                raise ValueError(f"Anchors: {name}={getattr(self, name)} must be at least 2.")
        if self.source != "auto" and not Path(self.source).is_file():
            raise ValueError(
                f"Anchors: there is no file {str(self.source)!r}. Write one with mtt anchors, or use 'auto'."
            )

    def sequences(self, base: Base, tokenizer: Any, folder: Path) -> list[list[int]]:
        """Token ids of each; ``"auto"`` writes what ``folder`` doesn't hold yet for this base and these settings.

        Raises ValueError for a file that holds none, or a base that is sharded and would have to write.
        """
        if self.source != "auto":
            return load_anchors(Path(self.source), tokenizer)
        config: Any = getattr(base.model, "config", None)
        told = [getattr(config, "name_or_path", ""), self.count, self.length, self.seed]
        file = folder / f"anchors-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:10]}.jsonl"
        if not file.exists():
            if is_sharded(base.model):
                raise ValueError(
                    "anchors='auto' are written by the first process, and the model is sharded (ZeRO-3). Let mtt "
                    "anchors write a file beforehand, and give that."
                )
            rows = write_anchors(
                base.model, tokenizer, self.count, length=self.length, seed=self.seed, context=base.context
            )
            save_anchors(rows, file)
        return load_anchors(file, tokenizer)


# ---------------------------------------------------------------------------------------------------------- writing


def write_anchors(
    model: nn.Module,
    tokenizer: Any,
    count: int = 512,
    *,
    length: int = 64,
    temperatures: Sequence[float] = (0.7, 1.0),
    seed: int = 0,
    batch_size: int = 64,
    context: Callable[[], Any] = nullcontext,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Short sequences sampled from a model as it stands, all different: what anchors are.

    Half of them begin with the chat template and an open user's turn, which the model writes, and then answers; the
    others, or all where there is no template, with what begins a text. The temperatures take turns.

    Args:
        model: a causal LM that can ``generate``; within ``context()`` it must be the base.
        length: tokens at most, of an answer or a text; a user's turn has at most 32.
        batch_size: sequences that are written at a time.

    Returns:
        Rows ``{"text", "start": "chat" or "text", "temperature"}``; ``text`` holds the special tokens. Fewer than
        ``count``, with a warning, where the model repeats itself too much.
    """
    turn = _open_turn(tokenizer)
    starts = ["chat", "text"] if turn is not None else ["text"]
    written: dict[str, dict[str, Any]] = {}
    devices = [next(model.parameters()).device] if next(model.parameters()).device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        evaluating(model),
        context(),
        tqdm(total=count, desc="anchors", unit="sequence", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        kinds = [(start, temperature) for temperature in temperatures for start in starts]
        size = min(batch_size, -(-count // len(kinds)))
        for batch in range(ROUNDS * -(-count // size)):
            start, temperature = kinds[batch % len(kinds)]
            sample = _Sampler(model, tokenizer, temperature)
            texts = sample.chats(turn, size, length) if start == "chat" and turn else sample.texts(size, length)
            for text in texts:
                if len(written) < count and text not in written:
                    written[text] = {"text": text, "start": start, "temperature": temperature}
                    bar.update()
            if len(written) == count:
                break
    if len(written) < count:
        warnings.warn(f"{len(written)} different anchors of {count}: the model repeats itself.", stacklevel=2)
    return list(written.values())


def _open_turn(tokenizer: Any) -> str | None:
    """The chat template up to where a user writes; None without a template, or where it can't be told."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    whole = tokenizer.apply_chat_template([{"role": "user", "content": _OPEN}], tokenize=False)
    return whole[: whole.index(_OPEN)] if whole.count(_OPEN) == 1 else None


@dataclass
class _Sampler:
    model: Any
    tokenizer: Any
    temperature: float

    def texts(self, size: int, length: int) -> list[str]:
        tokenizer = self.tokenizer
        start = next(
            (t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if t is not None), None
        )
        if start is None:
            raise ValueError("anchors: the tokenizer has no token that begins a text (bos, eos or pad). Give a file.")
        ids = [[start, *answer] for answer in self._continue([[start]] * size, length)]
        return [tokenizer.decode(row) for row in ids if len(row) > 2]

    def chats(self, turn: str, size: int, length: int) -> list[str]:
        tokenizer = self.tokenizer
        opened = tokenizer(turn, add_special_tokens=False)["input_ids"]
        turns = self._continue([opened] * size, QUESTION_TOKENS)
        questions = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in turns]
        asked = [[{"role": "user", "content": question}] for question in questions if question]
        prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in asked]
        if not prompts:
            return []
        answers = self._continue([tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts], length)
        found = []
        for chat, row in zip(asked, answers, strict=True):
            answer = {"role": "assistant", "content": tokenizer.decode(row, skip_special_tokens=True).strip()}
            found.append(tokenizer.apply_chat_template([*chat, answer], tokenize=False))
        return found

    def _continue(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        """New tokens of each prompt, up to the end token and without it."""
        from transformers import GenerationConfig

        tokenizer, model = self.tokenizer, self.model
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        longest, device = max(map(len, prompts)), next(model.parameters()).device
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=device)
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
        sampling = GenerationConfig(  # nothing of the model's own: its top-p or penalties would change what it writes
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
        )
        rows = model.generate(input_ids=ids, attention_mask=real, generation_config=sampling)[:, longest:].tolist()
        return [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in rows]


def save_anchors(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """As JSON Lines, whole or not at all."""
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def load_anchors(file: Path, tokenizer: Any, max_length: int = 512) -> list[list[int]]:
    """Token ids of each row of a file, cut to ``max_length``; see :class:`Anchors` for what it may hold.

    Raises ValueError that names the line, if a row holds nothing that can be an anchor.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not a line of JSON ({error}).") from error
        text, special = _text_of(row, tokenizer, f"{file}, line {number}")
        ids = tokenizer(text, add_special_tokens=special)["input_ids"][:max_length]
        if len(ids) > 1:  # the last token predicts nothing
            found.append(ids)
    if not found:
        raise ValueError(f"{file} holds no sequence of at least two tokens, so there is nothing to anchor to.")
    return found


def written_by_a_model(file: Path) -> bool:
    """Whether a file of anchors is what :func:`write_anchors` gave, and not data, which would be replay."""
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    return all('"start": ' in line and "start" in json.loads(line) for line in lines)


def _text_of(row: Any, tokenizer: Any, where: str) -> tuple[str, bool]:
    """A row's text, and whether the tokenizer's own special tokens are to be added."""
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("text"), str):
        return row["text"], "start" not in row  # ours holds them already
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"] + row["completion"], True
    parts = [row.get(key) for key in ("messages", "prompt", "completion")]
    messages = [message for part in parts if isinstance(part, list) for message in part]
    if not messages:
        raise ValueError(
            f"{where}: an anchor needs 'text', 'messages', or 'prompt' and 'completion'. Found: {row!r:.80}"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False), False


# ------------------------------------------------------------------------------------------------------------ mixing


@dataclass
class AnchorCollator:
    """A collator that adds anchors to each batch before ``collator`` pads or flattens it.

    Anchors that are shorter than the batch's rows are joined to rows of nearly that length, since a padded batch pays
    for its longest row in each; so an anchor sees those before it in its row. Rows that are packed or flattened cost
    their own tokens, and there each anchor stays by itself.

    Which anchors a batch gets depends on the batch and the seed alone, so a resumed run gets the same, in any number of
    loader processes.

    Args:
        collator: makes tensors of a list of tokenised rows, with ``labels`` among them; or of lists of the documents
            that are packed into one row each, as axolotl's does.
        anchors: token ids of each.
        share: of the batch's tokens that are anchors, on average.

    Raises:
        ValueError: if rows hold something that an anchor can't have (pixels), or, in the first batch that is given an
            anchor, if the collator makes targets of it.
    """

    collator: Callable[[list[Any]], dict[str, Any]]
    anchors: Sequence[list[int]]
    share: float = 0.25
    seed: int = 0
    _checked: bool = field(default=False, init=False, repr=False)
    _of_length: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        packed = isinstance(rows[0], list)
        parts: list[list[dict[str, Any]]] = rows if packed else [rows]
        names = list(parts[0][0])
        unpadded = packed or "seq_lengths" in names or getattr(self.collator, "padding_free", False)
        unknown = [name for name in names if name not in _FEATURES]
        if any(_holds(row.get(name)) for part in parts for row in part for name in unknown):
            raise ValueError(
                f"anchors can't be added to these batches: their rows hold {', '.join(unknown)}, which an anchor of "
                "text alone hasn't got. Train without anchors; context_weight holds the prompts."
            )
        without_labels = not {"labels", "completion_mask", "assistant_masks"} & set(names)
        if without_labels:  # what TRL takes them to be
            parts = [[{**row, "labels": list(row["input_ids"])} for row in part] for part in parts]
            names.append("labels")
        mixed = []
        for part in parts:
            chosen = self._chosen(part, self.anchors if unpadded else self._joined(part))
            added = [{name: _FEATURES[name](ids) if name in _FEATURES else None for name in names} for ids in chosen]
            mixed.append([*map(dict, part), *added])  # of copies: collators pad a row's lists in place
        try:
            batch = self.collator(mixed if packed else mixed[0])
        except ValueError as error:
            if not without_labels:
                raise
            raise ValueError(
                f"the collator can't pad labels, which anchors need, so that they are not learned ({error}). {REMEDY}"
            ) from error
        if not self._checked and any(len(m) > len(p) for m, p in zip(mixed, parts, strict=True)):
            plain = [[dict(row) for row in part] for part in parts]
            self._check(batch, self.collator(plain if packed else plain[0]))
            self._checked = True
        return batch

    def _joined(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """The anchors, one after another in rows as long as the longest of ``rows``, or as what is added to them all;
        none is cut.

        Of a few lengths only, four between a power of two and the next, so that a cached base finds its rows again. A
        step takes 1.28 of plain training's time with them, and 2.19 with a row for each (docs/cost.md).
        """
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(1, min(max(lengths), int(self._wanted(sum(lengths)))))  # longer ones would be in few batches
        length = longest - longest % (1 << max(longest.bit_length() - 3, 0))
        if length not in self._of_length:
            joined: list[list[int]] = []
            for ids in self.anchors:
                if joined and len(joined[-1]) + len(ids) <= length:
                    joined[-1] = [*joined[-1], *ids]
                else:
                    joined.append(ids)
            self._of_length[length] = joined
        return self._of_length[length]

    def _chosen(self, rows: list[dict[str, Any]], anchors: Sequence[list[int]]) -> list[list[int]]:
        tokens = [list(map(int, row["input_ids"])) for row in rows]
        digest = hashlib.sha256(json.dumps([self.seed, tokens]).encode()).hexdigest()
        generator = random.Random(digest)
        wanted = self._wanted(sum(map(len, tokens)))
        chosen: list[list[int]] = []
        while True:
            ids = anchors[generator.randrange(len(anchors))]
            left = wanted - sum(map(len, chosen))
            if generator.random() * len(ids) >= left:  # a last one with the chance that makes the average right
                return chosen
            chosen.append(ids)

    def _wanted(self, tokens: int) -> float:
        """How many tokens of anchors go with so many of the data, on average."""
        return tokens * self.share / (1 - self.share)

    @staticmethod
    def _check(batch: Mapping[str, Any], without: Mapping[str, Any]) -> None:
        found, expected = ((part["labels"] != IGNORE_INDEX).sum().item() for part in (batch, without))
        if found != expected:
            raise ValueError(
                f"the collator makes {found - expected} targets of the anchors' tokens: it builds labels from "
                "input_ids, so that they would be learned. "
                f"{REMEDY}"
            )


def _holds(value: Any) -> bool:
    """Whether a row's feature is there: LLaMA-Factory's rows of text have images, videos and audios, which are None."""
    return value is not None and not (isinstance(value, list) and not value)
