"""The result's form, the pairing of base and adapted, and what wrong input gets."""

import json
import math
import random
import statistics
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from test_probes import character_tokenizer, rows, toy

from conftest import toy_llama, with_lora
from mask_the_target.base import adapters_off
from mask_the_target.front import evaluate, facts, probes
from mask_the_target.front.evaluate import (
    ProbeSizes,
    add_paired_errors,
    check_probes,
    evaluate_one,
    evaluate_pair,
    paired_stderr,
)
from mask_the_target.front.facts import FACTS
from mask_the_target.front.probes import evenly

SIZES = ProbeSizes(
    target_rows=10, answer_rows=4, text_windows=4, facts_per_kind=2, instructions_per_kind=1, drift_rows=3, documents=6
)


def test_a_pair_holds_every_probe_of_both_states() -> None:
    model, tokenizer, data = with_lora(toy(), moved=0.3), character_tokenizer(), rows(12)
    common: dict[str, Any] = {"target_rows": data, "max_new_tokens": 4, "sizes": SIZES, "autocast": None}
    found = evaluate_pair(model, tokenizer, probes=["target", "text", "facts", "drift"], **common)
    assert list(found["base"]) == ["target", "text:python_docs", "text:bible", "facts"]
    assert list(found["adapted"]) == ["target", "text:python_docs", "text:bible", "facts", "drift"]
    assert json.loads(json.dumps(found)) == found

    # The base is the model with its adapters off, the adapted one the model as it is.
    with adapters_off(model):
        off = probes.target_loss(model, tokenizer, evenly(data, 10))
    on = probes.target_loss(model, tokenizer, evenly(data, 10))
    base, adapted = found["base"]["target"], found["adapted"]["target"]
    assert base["loss"] == pytest.approx(off.loss, abs=1e-6)
    assert adapted["loss"] == pytest.approx(on.loss, abs=1e-6)
    assert off.loss != pytest.approx(on.loss, abs=1e-3)

    # Standard errors are of the paired differences.
    differences = [a - b for a, b in zip(on.sums, off.sums, strict=True)]
    expected = statistics.stdev(differences) * math.sqrt(len(differences)) / sum(on.tokens)
    assert adapted["stderr"] == pytest.approx(expected, abs=1e-6)
    assert "stderr" not in base
    text = [found[state]["text:bible"]["samples"]["loss"] for state in ("adapted", "base")]
    assert found["adapted"]["text:bible"]["stderr"] == pytest.approx(
        statistics.stdev([a - b for a, b in zip(*text, strict=True)]) / math.sqrt(4)
    )
    assert {"greedy_stderr", "logprob_stderr"} <= set(found["adapted"]["facts"])
    _check_answers(found, model, tokenizer, evenly(data, 4))

    # A few of the answers that the scores are made of, to the same questions in both.
    answered = evenly(data, 4)
    with adapters_off(model):
        answers = probes.greedy_answers(model, tokenizer, [row["prompt"] for row in answered], 4)
    assert base["answers"] == [
        {"question": row["prompt"][-1]["content"], "right": probes.completion_text(row), "answer": answer}
        for row, answer in zip(answered, answers, strict=True)
    ]
    for probe in ("target", "facts"):
        asked = [[(row["question"], row["right"]) for row in found[state][probe]["answers"]] for state in found]
        assert asked[0] == asked[1]
    questions = evenly(facts.questions(limit=2), evaluate.SHOWN)
    assert asked[0] == [(question.text, question.answer) for question in questions]
    assert found["base"]["facts"]["n"] == 2 * len(FACTS)
    assert found["base"]["target"]["n"] == 10
    assert found["base"]["target"]["answered"] == 4


def _check_answers(found: dict[str, evaluate.Result], model: Any, tokenizer: Any, asked: list[Any]) -> None:
    """Exact match, token error rate and chrF of both states, from answers generated anew."""
    references = [row["completion"][0]["content"] for row in asked]
    edits = {}
    for state, context in (("base", adapters_off(model)), ("adapted", nullcontext())):
        with context:
            answers = probes.greedy_answers(model, tokenizer, [row["prompt"] for row in asked], 4)
        edits[state], tokens = probes.token_edits(answers, references)
        target = found[state]["target"]
        assert (
            target["exact_match"] == sum(a.split() == b.split() for a, b in zip(answers, references, strict=True)) / 4
        )
        assert target["token_error_rate"] == sum(edits[state]) / sum(len(text.split()) for text in references)
        assert target["chrf"] == sacrebleu.corpus_chrf(answers, [references]).score
        assert ("token_error_rate_stderr" in target, "chrf_stderr" in target) == (state == "adapted", False)
    differences = [a - b for a, b in zip(edits["adapted"], edits["base"], strict=True)]
    assert found["adapted"]["target"]["token_error_rate_stderr"] == pytest.approx(
        statistics.stdev(differences) * math.sqrt(4) / tokens
    )


def test_the_base_measured_earlier_gives_the_same_errors_as_a_pair(tmp_path: Path) -> None:
    model, tokenizer = with_lora(toy(), moved=0.3), character_tokenizer()
    pair = evaluate_pair(model, tokenizer, probes=["text"], sizes=SIZES)
    with adapters_off(model):
        base = evaluate_one(model, tokenizer, ["text"], sizes=SIZES)
    (tmp_path / "base.json").write_text(json.dumps(base))
    again = evaluate_one(model, tokenizer, ["text"], sizes=SIZES, base=json.loads((tmp_path / "base.json").read_text()))
    assert again == pair["adapted"]


def test_without_an_adapter_there_is_no_pair_and_no_drift() -> None:
    with pytest.raises(ValueError, match="no adapter layer"):
        evaluate_pair(toy(), character_tokenizer(), probes=["text"], sizes=SIZES)
    with pytest.raises(ValueError, match="no adapter layer"):
        evaluate_one(toy(), character_tokenizer(), ["drift"], target_rows=rows(3), sizes=SIZES)


def test_drift_alone_measures_no_base() -> None:
    found = evaluate_pair(with_lora(toy()), character_tokenizer(), probes=["drift"], target_rows=rows(3), sizes=SIZES)
    assert found["base"] == {}
    assert found["adapted"]["drift"]["masked_kl"] == pytest.approx(0, abs=1e-6)


def test_probes_are_checked() -> None:
    assert check_probes(["text:bible", "text", "facts"]) == ["text:bible", "text:python_docs", "facts"]
    with pytest.raises(
        ValueError,
        match=r"'mmlu'. Known: target, text, text:python_docs, text:bible, facts, facts:system, facts:alpaca, "
        "facts:plain, instructions, drift, lm_eval:TASK",
    ):
        check_probes(["facts", "mmlu"])
    with pytest.raises(ValueError, match=r"unknown probe 'fact'\. Did you mean 'facts'\?"):
        check_probes(["fact"])
    with pytest.raises(ValueError, match="no probe was asked for"):
        check_probes([])


@pytest.mark.parametrize("probe", ["target", "drift"])
def test_probes_of_the_target_need_rows(probe: str) -> None:
    with pytest.raises(ValueError, match=r"need held-out target rows.*arpabet"):
        evaluate_one(toy_llama(), character_tokenizer(), [probe])


def test_a_subset_is_even_and_ordered() -> None:
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(3), 5) == [0, 1, 2]
    for count in range(1, 40):
        places = evenly(range(40), count)
        gaps = [b - a for a, b in pairwise(places)]
        assert len(places) == count
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_paired_error_is_that_of_the_differences() -> None:
    chance = random.Random(0)
    base = [chance.gauss(3, 1) for _ in range(400)]
    adapted = [value + 0.1 + chance.gauss(0, 0.05) for value in base]
    assert paired_stderr(adapted, base) == pytest.approx(0.05 / math.sqrt(400), rel=0.1)  # not 1 / sqrt(400)
    assert math.isnan(paired_stderr([1.0], [2.0]))
    with pytest.raises(ValueError, match="2 samples can't be paired with 3"):
        paired_stderr([1, 2], [1, 2, 3])


def test_the_target_errors_are_per_token() -> None:
    counts = {"tokens": 8, "answer_tokens": 4}
    base: evaluate.Result = {"target": {**counts, "samples": {"nats": [4.0, 8.0], "edits": [3, 1]}}}
    adapted: evaluate.Result = {"target": {**counts, "samples": {"nats": [2.0, 2.0], "edits": [0, 0]}}}
    add_paired_errors(adapted, base)
    # Rows of four tokens: the per-token differences are -0.5 and -1.5, whose mean has a standard error of 0.5.
    assert adapted["target"]["stderr"] == pytest.approx(0.5)
    # Right answers of two: -1.5 and -0.5 edits per token.
    assert adapted["target"]["token_error_rate_stderr"] == pytest.approx(0.5)
