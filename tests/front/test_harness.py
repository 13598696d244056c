"""Tasks of lm-evaluation-harness: tasks made from our own probes give what our probes give, without a network."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import socket
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

import yaml
from test_probes import character_tokenizer, chat, rows, toy

from conftest import with_lora
from mask_the_target.front import harness, probes
from mask_the_target.front.evaluate import ProbeSizes, check_probes, evaluate_one, evaluate_pair
from mask_the_target.front.facts import questions

SIZES = ProbeSizes(target_rows=24, answer_rows=24, text_windows=6, facts_per_kind=5, drift_rows=3, documents=1000)
BY_TOKEN = """
def process_results(doc, results):
    means = [nats / tokens for (nats, _), tokens in zip(results, doc["tokens"], strict=True)]
    return {"acc": float(max(means) == means[0])}
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_task(folder: Path, name: str, docs: list[dict[str, Any]], **config: Any) -> str:
    """A task file in `folder` with data of its own; the probe's name."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    content = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **config}
    text = yaml.safe_dump(content).replace("'!function utils.process_results'", "!function utils.process_results")
    (folder / f"{name}.yaml").write_text(text)
    return f"lm_eval:{folder / name}.yaml"


def write_facts(folder: Path, tokenizer: Any, name: str = "our_facts", kinds: list[str] | None = None) -> str:
    """Our facts as multiple choice, scored by the mean over tokens as ours are."""
    docs = []
    for question in questions(limit=5, kinds=kinds):
        choices = [question.answer, *question.distractors]
        tokens = [len(tokenizer(f" {choice}")["input_ids"]) for choice in choices]
        docs.append({"question": question.text, "stem": question.stem, "choices": choices, "tokens": tokens})
    folder.mkdir(exist_ok=True)
    (folder / "utils.py").write_text(BY_TOKEN)
    return write_task(
        folder,
        name,
        docs,
        output_type="multiple_choice",
        doc_to_text="question",
        gen_prefix="stem",
        doc_to_choice="choices",
        doc_to_target=0,
        process_results="!function utils.process_results",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )


# ------------------------------------------------------------------------------- a task gives what our probe gives


def test_facts_as_a_task_give_what_the_facts_probe_gives(tmp_path: Path) -> None:
    model, tokenizer = with_lora(toy(), moved=0.3), character_tokenizer()
    task = write_facts(tmp_path / "tasks", tokenizer)
    found = evaluate_pair(model, tokenizer, probes=["facts", task], sizes=SIZES, autocast=None)
    for state in ("base", "adapted"):
        ours, theirs = found[state]["facts"], found[state][task]
        assert theirs["samples"]["score"] == ours["samples"]["logprob"]
        assert theirs["score"] == theirs["acc,none"] == pytest.approx(ours["logprob"])
        spread = statistics.stdev(ours["samples"]["logprob"])
        assert theirs["acc_stderr,none"] == pytest.approx(spread / math.sqrt(ours["n"]))
        assert (theirs["n"], theirs["metric"], theirs["better"]) == (ours["n"], "acc,none", "higher")
        assert theirs["chat_template"]
    assert found["adapted"][task]["score_stderr"] == pytest.approx(found["adapted"]["facts"]["logprob_stderr"])
    assert found["base"]["facts"]["samples"]["logprob"] != found["adapted"]["facts"]["samples"]["logprob"]
    assert json.loads(json.dumps(found)) == found


def test_windows_of_text_as_a_task_give_what_the_text_probe_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness puts the first token before a text, as our tokenizer with a bos token does."""
    model, tokenizer = with_lora(toy(), moved=0.3), character_tokenizer(bos=True)
    text = "".join(random.Random(0).choices("abcdefghij ", k=4000))
    monkeypatch.setitem(probes.TEXT_SOURCES, "bible", lambda: text)
    windows = probes.text_windows(tokenizer, text, SIZES.text_windows, 256)
    docs = [{"text": tokenizer.decode(ids[1:])} for ids in windows]
    assert all(len(doc["text"]) == 255 for doc in docs)
    metrics = [{"metric": metric} for metric in ("bits_per_byte", "byte_perplexity")]
    kind = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    task = write_task(tmp_path / "tasks", "our_text", docs, **kind, metric_list=metrics)
    ours = evaluate_pair(model, tokenizer, probes=["text:bible"], sizes=SIZES, autocast=None)
    theirs = evaluate_pair(model, character_tokenizer(), probes=[task], sizes=SIZES, autocast=None)
    for state in ("base", "adapted"):
        loss, found = ours[state]["text:bible"]["loss"], theirs[state][task]
        assert found["bits_per_byte,none"] * math.log(2) == pytest.approx(loss, abs=1e-5)  # one byte a token
        assert found["byte_perplexity,none"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert found["better"] == "lower"
        assert "samples" not in found  # a ratio of sums, which no document has a part of
    assert ours["base"]["text:bible"]["loss"] != pytest.approx(ours["adapted"]["text:bible"]["loss"], abs=1e-3)


def test_answers_as_a_task_give_the_target_probes_exact_match(tmp_path: Path) -> None:
    model, tokenizer, data = with_lora(toy(), moved=0.02), character_tokenizer(), rows(24)
    answers = probes.greedy_answers(model, tokenizer, [row["prompt"] for row in data], 3)
    for row, answer in zip(data[::2], answers[::2], strict=True):  # half of them right for the adapted model
        row["completion"][0]["content"] = answer
    docs = [{"question": row["prompt"][0]["content"], "answer": row["completion"][0]["content"]} for row in data]
    task = write_task(
        tmp_path / "tasks",
        "our_answers",
        docs,
        output_type="generate_until",
        doc_to_text="question",
        doc_to_target="answer",
        generation_kwargs={"until": [], "max_gen_toks": 3, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    common: dict[str, Any] = {"target_rows": data, "max_new_tokens": 3, "sizes": SIZES, "autocast": None}
    found = evaluate_pair(model, tokenizer, probes=["target", task], **common)
    for state in ("base", "adapted"):
        assert found[state][task]["samples"]["score"] == found[state]["target"]["samples"]["exact_match"]
        assert found[state][task]["score"] == found[state]["target"]["exact_match"]
    scores = [found[state]["target"]["exact_match"] for state in ("base", "adapted")]
    assert 0 < scores[0] < scores[1] < 1
    assert found["adapted"][task]["score_stderr"] == found["adapted"]["target"]["exact_match_stderr"] > 0
