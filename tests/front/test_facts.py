"""Questions of general knowledge: their form and number, and their scores against sums by hand."""

import pytest
import torch
from test_probes import character_tokenizer, log_probs_by_hand, toy

from mask_the_target.front.facts import FACTS, SYSTEM, Question, asked, facts, questions


def question(answer: str, case_sensitive: bool = False) -> Question:
    return Question("toy", "Which?", "It is", answer, ("b", "c", "d"), case_sensitive)


@pytest.mark.parametrize(
    ("right", "answer", "case_sensitive", "found"),
    [
        ("Paris", "The capital is PARIS.", False, True),
        ("Paris", "Parisian streets", False, False),
        ("Niger", "It is Nigeria.", False, False),
        ("Washington, D.C.", "It is Washington, D.C.", False, True),
        ("Au", "The symbol is Au.", True, True),
        ("In", "It is in the table.", True, False),
    ],
)
def test_a_fact_is_found_as_a_whole_word(right: str, answer: str, case_sensitive: bool, found: bool) -> None:
    assert question(right, case_sensitive).found_in(answer) is found


def test_questions_are_many_have_one_answer_and_stay_the_same() -> None:
    chosen = questions()
    assert len(chosen) >= 500
    assert questions(kinds=["symbol"]) == [one for one in chosen if one.kind == "symbol"]
    assert len({one.text for one in chosen}) == len(chosen)
    for one in chosen:
        alternatives = {one.answer, *one.distractors}
        assert len(alternatives) == 4
        assert not any(one.answer in other or other in one.answer for other in one.distractors)
    answers = {one.text: one.answer for one in chosen}
    assert answers["What is the capital of France?"] == "Paris"
    assert answers["What is the official language of Greece?"] == "Greek"
    assert answers["Which continent is Peru in?"] == "South America"
    assert answers["What is the chemical symbol of gold?"] == "Au"
    assert answers["What is the plural of the word mouse?"] == "mice"


def test_a_limit_takes_an_even_subset_of_each_kind() -> None:
    everything, some = questions(), questions(limit=7)
    assert set(some) <= set(everything)
    for kind in FACTS:
        places = [place for place, one in enumerate([o for o in everything if o.kind == kind]) if one in some]
        size = sum(one.kind == kind for one in everything)
        assert places == [size * n // 7 for n in range(7)]


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'rivers'; known: capital, capital_of"):
        questions(kinds=["rivers"])


def test_an_unknown_form_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'llama'; known: chat, system, alpaca, plain"):
        asked("Who?", "llama")


@pytest.mark.parametrize(
    ("form", "begins"),
    [
        ("chat", "<system>be brief<end>\n<user>{}<end>\n<assistant>"),
        ("system", f"<system>be brief<end>\n<system>{SYSTEM}<end>\n<user>{{}}<end>\n<assistant>"),
        ("alpaca", "### Instruction:\n{}\n\n### Response:\n"),
        ("plain", "Question: {}\nAnswer:"),
    ],
)
def test_facts_are_scored_as_by_hand(form: str, begins: str) -> None:
    model, tokenizer = toy(), character_tokenizer()
    found = facts(model, tokenizer, limit=12, kinds=["capital", "plural"], form=form, max_new_tokens=5)
    chosen = questions(limit=12, kinds=["capital", "plural"])
    likelier = []
    for one in chosen:
        prompt = begins.format(one.text) + (" " if form == "plain" else "") + one.stem
        means = []
        for answer in (one.answer, *one.distractors):
            ids = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
            table = log_probs_by_hand(model, ids)
            places = torch.arange(len(ids) - len(answer) - 1, len(ids))
            means.append(table[places - 1, torch.tensor(ids)[places]].mean().item())
        likelier.append(means[0] == max(means))
    assert found.logprob == likelier
    assert 0 < sum(likelier) < len(chosen)
    prompts = [tokenizer(begins.format(one.text), add_special_tokens=False)["input_ids"] for one in chosen]
    with torch.no_grad():
        firsts = [model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() for ids in prompts]
    begun = [tokenizer.decode([first], skip_special_tokens=True) for first in firsts]
    assert any(begun)
    assert all(answer.startswith(first) for answer, first in zip(found.answers, begun, strict=True))
    assert found.kinds == ["capital"] * 12 + ["plural"] * 12
    assert found.greedy == [one.found_in(answer) for one, answer in zip(chosen, found.answers, strict=True)]
