"""General knowledge as questions: what is asked, where the answers come from, and how a model's answers are scored.

The questions are made from tables that come with packages (countries, languages, elements, plurals), so there are
many, and the same on every machine that has the same packages.
"""

from __future__ import annotations

import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from mask_the_target.front.backbones import package_folder
from mask_the_target.front.probes import Item, answer_losses, chat_prompt, greedy_answers, measuring

# --- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactKind:
    """One kind of question: how it is asked, how the answer's sentence begins, and where the pairs come from."""

    question: str  # {} is the subject
    stem: str  # the beginning of the assistant's turn, for the log-probability
    pairs: Callable[[], list[tuple[str, str]]]  # (subject, right answer)
    case_sensitive: bool = False


@dataclass(frozen=True)
class Question:
    """One question with its right answer and three distractors of the same kind."""

    kind: str
    text: str
    stem: str
    answer: str
    distractors: tuple[str, ...]
    case_sensitive: bool

    def found_in(self, answer: str) -> bool:
        """Whether the right answer stands in `answer` as a whole word."""
        flags = 0 if self.case_sensitive else re.IGNORECASE
        return re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", answer, flags) is not None


# --- tables ----------------------------------------------------------------------------------------------------------


@cache
def _countries() -> list[dict[str, Any]]:
    """Countries of more than 3 million people. The package's files are read; importing it needs a newer Python."""
    folder = package_folder("countryinfo", "the probe 'facts'", "pip install countryinfo")
    countries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "data").glob("*.json"))]
    return [country for country in countries if (country.get("population") or 0) > 3e6]


def _countries_with(subject: str, answer: str) -> Callable[[], list[tuple[str, str]]]:
    return lambda: [(c[subject], c[answer]) for c in _countries() if c.get(subject) and c.get(answer)]


def _continents() -> list[tuple[str, str]]:
    def continent(country: dict[str, Any]) -> str:
        if country["region"] != "Americas":
            return country["region"]
        return "South America" if country.get("intermediateregion") == "South America" else "North America"

    return [(country["name"], continent(country)) for country in _countries()]


def _languages() -> list[tuple[str, str]]:
    """Of countries with one official language. ISO 639 calls Greek "Modern Greek (1453-)"."""
    folder = package_folder("pycountry", "the probe 'facts'", "pip install pycountry")
    entries = json.loads((folder / "databases" / "iso639-3.json").read_text(encoding="utf-8"))["639-3"]
    names = {e["alpha_2"]: e["name"].split(" (")[0].removeprefix("Modern ") for e in entries if "alpha_2" in e}
    spoken = [(country["name"], country["languages"]) for country in _countries()]
    return [(name, names[codes[0]]) for name, codes in spoken if len(codes) == 1 and codes[0] in names]


def _elements(subject: str, answer: str) -> Callable[[], list[tuple[str, str]]]:
    def pairs() -> list[tuple[str, str]]:
        elements = _imported("periodictable").elements
        return [(getattr(element, subject), getattr(element, answer)) for element in elements]

    return pairs


_NOUNS = (
    "analysis baby bacterium basis box bus calf child church city crisis criterion diagnosis dish elf foot glass "
    "goose half hero hypothesis key knife lady leaf life loaf louse man match mongoose mouse oasis ox party person "
    "phenomenon photo piano potato quiz roof scarf self shelf story thesis tomato tooth wife wolf woman "
)


def _plurals() -> list[tuple[str, str]]:
    engine = _imported("inflect").engine()
    return [(noun, engine.plural_noun(noun)) for noun in _NOUNS.split()]


def _imported(module: str) -> Any:
    package_folder(module, "the probe 'facts'", f"pip install {module}")
    return importlib.import_module(module)


# Left out, because SmolLM2-135M-Instruct can't do them: atomic numbers, country codes, currencies, number words.
FACTS: dict[str, FactKind] = {
    "capital": FactKind("What is the capital of {}?", "The capital of {} is", _countries_with("name", "capital")),
    "capital_of": FactKind(
        "Which country's capital is {}?", "{} is the capital of", _countries_with("capital", "name")
    ),
    "nationality": FactKind(
        "What nationality is someone from {}?", "Someone from {} is", _countries_with("name", "demonym")
    ),
    "country": FactKind(
        "Which country does someone who is {} come from?",
        "Someone who is {} comes from",
        _countries_with("demonym", "name"),
    ),
    "continent": FactKind("Which continent is {} in?", "{} is in", _continents),
    "language": FactKind("What is the official language of {}?", "The official language of {} is", _languages),
    "symbol": FactKind(
        "What is the chemical symbol of {}?",
        "The chemical symbol of {} is",
        _elements("name", "symbol"),
        case_sensitive=True,  # "In", "As", "I" and "No" are words too
    ),
    "element": FactKind(
        "Which element has the chemical symbol {}?", "{} is the chemical symbol of", _elements("symbol", "name")
    ),
    "plural": FactKind("What is the plural of the word {}?", "The plural of {} is", _plurals),
}


def questions(limit: int | None = None, kinds: Iterable[str] | None = None) -> list[Question]:
    """Every question, at most `limit` of each kind, spread evenly over it; the same on every machine.

    Raises ValueError for an unknown kind, ModuleNotFoundError when a package with facts is missing.
    """
    chosen: list[Question] = []
    for name in kinds or FACTS:
        if name not in FACTS:
            raise ValueError(f"unknown kind of facts {name!r}; known: {', '.join(FACTS)}")
        kind = FACTS[name]
        pairs = _unambiguous(kind)
        answers = sorted({answer for _, answer in pairs})
        size = min(limit or len(pairs), len(pairs))
        for subject, answer in (pairs[place * len(pairs) // size] for place in range(size)):
            others = [other for other in answers if other not in answer and answer not in other]
            distractors = random.Random(f"{name}: {subject}").sample(others, 3)
            text, stem = kind.question.format(subject), kind.stem.format(subject)
            chosen.append(Question(name, text, stem, answer, tuple(distractors), kind.case_sensitive))
    return chosen


def _unambiguous(kind: FactKind) -> list[tuple[str, str]]:
    """Without subjects that have several answers ("Congolese") and answers that an echo would give ("Singapore")."""
    pairs = kind.pairs()
    counts = Counter(subject for subject, _ in pairs)
    return [pair for pair in pairs if counts[pair[0]] == 1 and pair[0] != pair[1]]


# --- how they are asked ----------------------------------------------------------------------------------------------

# Beside the model's own chat template: with a system turn of its own, in another template, and in none. What a model
# keeps in the form that it was trained in, it may lose in others.
SYSTEM = "You answer questions of general knowledge."
TEXT_FORMS = {"alpaca": "### Instruction:\n{}\n\n### Response:\n", "plain": "Question: {}\nAnswer:"}
FORMS = ("chat", "system", *TEXT_FORMS)


def asked(question: str, form: str) -> str | list[dict[str, str]]:
    """The prompt of a question in one of FORMS: text, or the turns of a chat. Raises ValueError for another form."""
    if form not in FORMS:
        raise ValueError(f"unknown form of a question {form!r}; known: {', '.join(FORMS)}")
    if form in TEXT_FORMS:
        return TEXT_FORMS[form].format(question)
    turns = [{"role": "user", "content": question}]
    return [{"role": "system", "content": SYSTEM}, *turns] if form == "system" else turns


# --- scoring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Per question, in one order: its kind, whether the greedy answer contains the right one, and whether the right
    answer is likelier than its three distractors."""

    kinds: list[str]
    greedy: list[bool]
    logprob: list[bool]
    answers: list[str] = field(repr=False)
    questions: list[Question] = field(repr=False)


def facts(
    model: nn.Module,
    tokenizer: Any,
    *,
    limit: int | None = None,
    kinds: Iterable[str] | None = None,
    form: str = "chat",
    max_new_tokens: int = 16,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> Facts:
    """Questions of general knowledge in one of FORMS, at most `limit` of each kind; all kinds of FACTS by default.

    Two scores, because two things can be lost. `greedy`: the right answer stands, as a whole word, in the first
    `max_new_tokens` greedy tokens; this falls when the *form* of answers drifts. `logprob`: the answer is begun for
    the model ("The capital of France is"), and the right answer must be likelier than three others of its
    kind by the mean log-probability of its tokens (the mean, or short answers would win); this falls when the
    *knowledge* goes.
    """
    chosen = questions(limit=limit, kinds=kinds)
    prompts = [asked(question.text, form) for question in chosen]
    items = [_fact_item(tokenizer, *row) for row in zip(range(len(chosen)), chosen, prompts, strict=True)]
    with measuring(model, autocast):
        losses = answer_losses(model, items, label="facts: log-probability", progress=progress)
    means = [[loss.mean().item() for loss in row] for row in losses]
    answers = greedy_answers(
        model, tokenizer, prompts, max_new_tokens, autocast=autocast, progress=progress, label="facts: greedy"
    )
    return Facts(
        kinds=[question.kind for question in chosen],
        greedy=[question.found_in(answer) for question, answer in zip(chosen, answers, strict=True)],
        logprob=[row[0] < min(row[1:]) for row in means],
        answers=answers,
        questions=chosen,
    )


def _fact_item(tokenizer: Any, index: int, question: Question, prompt: str | list[dict[str, str]]) -> Item:
    """Prompt and stem, then each alternative: " Paris" first, the distractors after it."""
    if special := isinstance(prompt, str):  # a template writes them
        begun = prompt + ("" if prompt[-1].isspace() else " ") + question.stem
    else:
        begun = chat_prompt(tokenizer, prompt) + question.stem
    prompt_ids = tokenizer(begun, add_special_tokens=special)["input_ids"]
    answers = []
    for answer in (question.answer, *question.distractors):
        whole = tokenizer(f"{begun} {answer}", add_special_tokens=special)["input_ids"]
        if whole[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                f"the tokenizer joins {question.stem!r} and {answer!r}, so the answer can't be scored alone."
            )
        answers.append(whole[len(prompt_ids) :])
    return Item(index, prompt_ids, answers)
