"""Checkable instructions: each check against answers that do and don't follow it, and the share by hand."""

import pytest
from test_probes import character_tokenizer, toy

from mask_the_target.front import evaluate, probes
from mask_the_target.front.evaluate import evaluate_one
from mask_the_target.front.instructions import INSTRUCTIONS, SUBJECTS, Instruction, follow_instructions, instructions

ANSWERS = {  # kind: answers that follow it, and answers that don't
    "json": (
        ['{"name": "Bone", "price": 3}', '```json\n{"price": "3", "name": "x"}\n```', '\n{"name": null, "price": []} '],
        ['{"name": "Bone"}', '{"name": 1, "price": 2, "size": 3}', 'Sure! {"name": 1, "price": 2}', "[1]", '{"name":'],
    ),
    "bullets": (
        ["- walk\n- run\n- sleep", "Three things:\n\n1. walk\n2. run\n3. sleep\n\nEnjoy.", "* a\n  * b\n• c"],
        ["- walk\n- run", "- a\n- b\n- c\n- d", "walk, run and sleep", "-walk\n-run\n-sleep"],
    ),
    "numbered": (
        ["1. They bark.\n2. They run.\n3. They sl", "Facts:\n1) a\n2) b\n3) c\n4) d"],
        ["- a\n- b\n- c", "1. a\n3. b\n2. c", "1. a 2. b 3. c", "1. a\n2. b"],
    ),
    "question": (["Do you like dogs?"], ["Do you like dogs", "I ask. Do you?", "Why? How?", "Is it so? Yes"]),
    "one_sentence": (
        ["Dogs are loyal.", "Dogs, at 3.5 kg, are small!"],
        ["Dogs are loyal. They bark.", "Dogs are", "Dogs. are", "Is it? Yes"],
    ),
    "short": (["Dogs bark.", " ".join(["dog"] * 19)], [" ".join(["dog"] * 20)]),
    "with_word": (["A Beautiful, old dog."], ["A beauty.", "It stands beautifully."]),
    "yes_no": (["Yes.", "no, never", "YES"], ["Maybe yes", "Nobody", "Dogs? Yes."]),
    "dear": (["Dear Anna,\nhow are you?", "dear anna"], ["Dear Annabel,", "Hello, Dear Anna", "Anna"]),
}


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_what_follows_an_instruction_and_what_does_not(kind: str) -> None:
    right, wrong = ANSWERS[kind]
    asked = Instruction(kind, "")
    assert [asked.followed_in(answer) for answer in right] == [True] * len(right)
    assert [asked.followed_in(answer) for answer in [*wrong, "", " \n"]] == [False] * (len(wrong) + 2)


def test_instructions_are_the_same_every_time_and_fewer_are_an_even_part() -> None:
    everything, some = instructions(), instructions(4)
    assert everything == instructions()
    assert len({one.text for one in everything}) == len(everything) == len(INSTRUCTIONS) * len(SUBJECTS) >= 150
    assert [one.text for one in some if one.kind == "yes_no"] == [
        f"Answer with yes or no: do people like {SUBJECTS[place]}?" for place in (0, 5, 10, 15)
    ]
    assert set(some) <= set(everything)


def test_the_share_is_that_of_the_greedy_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights follows none, so one kind that it follows at times is put beside."""
    monkeypatch.setitem(INSTRUCTIONS, "vowel", ("Say {}.", lambda answer: answer[0] in "aeiou"))
    model, tokenizer = toy(), character_tokenizer()
    asked = instructions(evaluate.SIZES["quick"].instructions_per_kind)
    answers = probes.greedy_answers(model, tokenizer, [[{"role": "user", "content": one.text}] for one in asked], 40)
    by_hand = [one.followed_in(answer) for one, answer in zip(asked, answers, strict=True)]

    found = follow_instructions(model, tokenizer, per_kind=8)
    assert (found.instructions, found.answers, found.followed) == (asked, answers, by_hand)

    probe = evaluate_one(model, tokenizer, ["instructions"], sizes=evaluate.SIZES["quick"], autocast=None)[
        "instructions"
    ]
    assert probe["followed"] == sum(by_hand) / len(asked)
    assert (probe["n"], probe["by_kind"]["vowel"]["n"]) == (len(asked), 8)
    assert probe["by_kind"]["vowel"]["followed"] == sum(by_hand[-8:]) / 8
    assert probe["samples"]["followed"] == [int(done) for done in by_hand]
    assert {(row["question"], row["answer"]) for row in probe["answers"]} <= set(
        zip([one.text for one in asked], answers, strict=True)
    )
