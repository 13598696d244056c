"""Instructions that a program can check: whether a model still does as it is told.

What counts is the form that was asked for and not what is said, as in IFEval (arXiv 2311.07911), whose own prompts ask
too much of a small model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mask_the_target.front.probes import evenly, greedy_answers

SUBJECTS = (
    "dogs",
    "winter",
    "bread",
    "music",
    "rivers",
    "books",
    "trains",
    "coffee",
    "gardens",
    "mountains",
    "football",
    "rain",
    "bicycles",
    "art",
    "school",
    "birds",
    "cheese",
    "history",
    "forests",
    "clocks",
)


@dataclass(frozen=True)
class Instruction:
    """One instruction: the name of its kind, and what is asked."""

    kind: str
    text: str

    def followed_in(self, answer: str) -> bool:
        """Whether the answer does what was asked. An empty one never does."""
        return bool(answer.strip()) and INSTRUCTIONS[self.kind][1](answer.strip())


def _words(answer: str) -> list[str]:
    return re.findall(r"[\w'-]+", answer.lower())


def _is_json(answer: str, keys: set[str]) -> bool:
    """Whether the answer is a JSON object with just these keys, in a code block or not."""
    block = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer, re.DOTALL)
    try:
        found = json.loads(block.group(1) if block else answer)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and set(found) == keys


# By kind: what is asked about a subject, and whether an answer does it. SmolLM2-135M-Instruct does each of them for at
# least seven subjects of ten. Left out, because it does them for two at most: one word, capitals or lowercase only, the
# first or last word, an exclamation mark, double quotes, two sentences, a bare number, three words and commas.
INSTRUCTIONS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "json": (
        'Reply in JSON with the keys "name" and "price", for something to do with {}. Write only the JSON.',
        lambda answer: _is_json(answer, {"name", "price"}),
    ),
    "bullets": (
        "List three things to do with {} as bullet points.",
        lambda answer: len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s+\S", answer, re.MULTILINE)) == 3,
    ),
    "numbered": (
        "Write a numbered list of three facts about {}.",
        lambda answer: re.findall(r"^\s*(\d+)[.)]\s", answer, re.MULTILINE)[:3] == ["1", "2", "3"],
    ),
    "question": (
        "Ask me one question about {}. Write only the question.",
        lambda answer: answer.endswith("?") and answer.count("?") == 1 and "." not in answer,
    ),
    "one_sentence": (
        "Tell me about {} in exactly one sentence.",
        lambda answer: len(re.findall(r"[.!?](?=\s|$)", answer)) == 1 and answer[-1] in ".!?",
    ),
    "short": ("Tell me about {} in fewer than twenty words.", lambda answer: len(_words(answer)) < 20),
    "with_word": (
        "Write one sentence about {} with the word beautiful in it.",
        lambda answer: "beautiful" in _words(answer),
    ),
    "yes_no": ("Answer with yes or no: do people like {}?", lambda answer: _words(answer)[:1] in (["yes"], ["no"])),
    "dear": (
        "Write a very short letter about {}. Begin it with the words Dear Anna.",
        lambda answer: _words(answer)[:2] == ["dear", "anna"],
    ),
}


def instructions(per_kind: int | None = None) -> list[Instruction]:
    """Every instruction, at most `per_kind` of each kind; the same on every machine."""
    return [
        Instruction(kind, text.format(subject))
        for kind, (text, _) in INSTRUCTIONS.items()
        for subject in evenly(SUBJECTS, per_kind or len(SUBJECTS))
    ]


@dataclass(frozen=True)
class Followed:
    """Per instruction, in one order: whether it was followed, and the answer."""

    followed: list[bool]
    answers: list[str] = field(repr=False)
    instructions: list[Instruction] = field(repr=False)


def follow_instructions(
    model: nn.Module,
    tokenizer: Any,
    *,
    per_kind: int | None = None,
    max_new_tokens: int = 40,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> Followed:
    """Greedy answers of `max_new_tokens` at most to `instructions(per_kind)`, in chat form, each checked.

    An answer that is cut off is checked as far as it goes; the base's are too.
    """
    asked = instructions(per_kind)
    turns = [[{"role": "user", "content": instruction.text}] for instruction in asked]
    answers = greedy_answers(
        model, tokenizer, turns, max_new_tokens, autocast=autocast, progress=progress, label="instructions"
    )
    followed = [instruction.followed_in(answer) for instruction, answer in zip(asked, answers, strict=True)]
    return Followed(followed, answers, asked)
