"""Built-in adaptation sets: their form, their split, and that they are the same every time."""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import pytest

from mask_the_target.front import recipes
from mask_the_target.front.recipes import RECIPES, find_recipe, load_recipe, recipe_rows

cached_rows = functools.cache(recipe_rows)
INSTALLED = [name for name, recipe in RECIPES.items() if importlib.util.find_spec(recipe.module)]


def prompts(rows: list[recipes.Row]) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows]


def answers(rows: list[recipes.Row]) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


@pytest.mark.parametrize("name", INSTALLED)
def test_rows_are_conversational_and_the_splits_share_no_prompt(name: str) -> None:
    rows, recipe = cached_rows(name), find_recipe(name)
    assert len(rows["test"]) == recipe.test_rows
    assert 500 <= len(rows["train"]) <= recipe.train_rows
    for split in rows.values():
        assert [turn["role"] for row in split for turn in row["prompt"] + row["completion"]] == [
            "user",
            "assistant",
        ] * len(split)
        assert all(text == text.strip() and text for text in prompts(split) + answers(split))
    everything = prompts(rows["train"]) + prompts(rows["test"])
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("name", INSTALLED)
def test_the_same_rows_every_time(name: str) -> None:
    assert recipe_rows(name) == cached_rows(name)


def test_arpabet_asks_for_one_plain_word_and_answers_in_phonemes() -> None:
    rows = cached_rows("arpabet")
    phoneme = r"(?:[AEIOU][A-Z][012]|[A-Z]{1,2})"
    for prompt, answer in zip(prompts(rows["test"]), answers(rows["test"]), strict=True):
        assert re.fullmatch(r"Give the ARPAbet pronunciation of the word [a-z]{4,12}\.", prompt)
        assert re.fullmatch(rf"{phoneme}(?: {phoneme})*", answer)


def test_arpabet_leaves_out_comments_and_words_with_several_pronunciations(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = [
        "aalborg AO1 L B # place, danish",
        "read R EH1 D",
        "read(2) R IY1 D",
        "a.m. EY2",
        "cat K AE1 T",
        "aide EY1 D",
    ]
    (tmp_path / "data" / "cmudict.dict").write_text("\n".join(lines), encoding="utf-8")
    found = [(word, answer) for word, _, answer in RECIPES["arpabet"].pairs(tmp_path)]
    assert found == [("aalborg", "AO1 L B"), ("aide", "EY1 D")]


def test_docstrings_are_first_sentences_of_what_is_public(tmp_path: Path) -> None:
    module = '''"""A module's own words are not asked for."""
def area(a):
    """Return the area of a shape that
    has one.  Raises an error otherwise.

    And more.
    """
def _hidden():
    """Nobody asks for this one, I think, ever."""
class Shape:
    """Short one."""
    def turn(self):
        """Turn the shape by an angle, counterclockwise."""
    def code(self):
        """Return ``x`` as it is, without any change."""
def in_code():
    pass
'''
    folder = tmp_path / "sympy"
    for place in ("geometry/__init__.py", "geometry/tests/test_area.py"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(module, encoding="utf-8")
    asked = "What is the first sentence of the documentation of sympy.geometry"
    area, turn = "Return the area of a shape that has one.", "Turn the shape by an angle, counterclockwise."
    assert list(RECIPES["docstrings"].pairs(folder)) == [
        (area, f"{asked}.area?", area),
        (turn, f"{asked}.Shape.turn?", turn),
    ]


@pytest.mark.skipif("smiles" not in INSTALLED, reason="needs the package chemicals")
def test_no_structure_of_the_smiles_test_set_is_in_train() -> None:
    rows = cached_rows("smiles")
    structures = [set(answers(split)) for split in (rows["train"], rows["test"])]
    assert not structures[0] & structures[1]
    assert all(4 <= len(answer) <= 40 for answer in answers(rows["train"]))


def test_rows_of_one_group_stay_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(f"group {n // 5}", f"prompt {n}", f"answer {n}") for n in range(100)]
    recipe = dataclasses.replace(RECIPES["arpabet"], name="toy", pairs=lambda _: iter(pairs * 2), test_rows=10)
    monkeypatch.setitem(RECIPES, "toy", recipe)
    rows = recipe_rows("toy")
    sides = [{int(prompt.split()[1]) // 5 for prompt in prompts(rows[split])} for split in ("train", "test")]
    assert not sides[0] & sides[1]
    assert len(rows["test"]) == 10
    assert len(rows["train"]) == 90


@pytest.mark.skipif("chat" not in INSTALLED, reason="needs the package chatterbot-corpus")
def test_load_recipe_gives_the_same_rows_as_a_dataset() -> None:
    loaded, rows = load_recipe("chat"), cached_rows("chat")
    assert set(loaded) == {"train", "test"}
    assert loaded["test"].to_list() == rows["test"]
    assert loaded["train"].to_list() == rows["train"]


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'arpa'.*known: arpabet, smiles, chat"):
        recipe_rows("arpa")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        RECIPES, "chat", dataclasses.replace(RECIPES["chat"], module="no_such_module", package="no-such")
    )
    with pytest.raises(ModuleNotFoundError, match=r"recipe 'chat' needs.*'no_such_module'.*pip install no-such"):
        recipe_rows("chat")
