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
pytest.importorskip("optuna")

import yaml
from peft import PeftModel
from test_probes import character_tokenizer, log_probs_by_hand, rows, toy

from conftest import with_lora
from front import test_sweep
from front.test_train import make_model
from mask_the_target.cli import main
from mask_the_target.front import harness, probes, sweep
from mask_the_target.front.backbones import load_model
from mask_the_target.front.evaluate import ProbeSizes, check_probes, evaluate_one, evaluate_pair
from mask_the_target.front.facts import questions

SIZES = ProbeSizes(
    target_rows=24,
    answer_rows=24,
    text_windows=6,
    facts_per_kind=5,
    instructions_per_kind=1,
    drift_rows=3,
    documents=1000,
)
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


def test_a_group_of_files_gives_its_own_figure_and_those_of_its_tasks(tmp_path: Path) -> None:
    model, tokenizer = with_lora(toy(), moved=0.3), character_tokenizer()
    capitals = write_facts(tmp_path / "tasks", tokenizer, "capitals", ["capital", "plural", "symbol"])
    symbols = write_facts(tmp_path / "tasks", tokenizer, "languages", ["language"])
    group = {"group": "both", "task": ["capitals", "languages"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "both.yaml").write_text(yaml.safe_dump(group))
    both = f"lm_eval:{tmp_path}/tasks/both.yaml"
    found = evaluate_pair(model, tokenizer, probes=[both, capitals, symbols], sizes=SIZES)["adapted"]
    samples = [found[task]["samples"]["score"] for task in (capitals, symbols)]
    assert [len(values) for values in samples] == [15, 5]
    assert found[both]["samples"]["score"] == [*samples[0], *samples[1]]
    assert found[both]["score"] == pytest.approx(statistics.fmean([*samples[0], *samples[1]]))
    assert found[both]["capitals/acc,none"] == found[capitals]["score"]
    assert found[both]["languages/acc,none"] == found[symbols]["score"]
    assert (found[both]["n"], found[both]["better"], found[both]["metric"]) == (20, "higher", "acc,none")


def test_a_limit_takes_documents_spread_over_the_task(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    task = write_facts(tmp_path / "tasks", tokenizer).removeprefix(harness.PREFIX)
    whole = harness.run_task(toy(), tokenizer, task, documents=1000)["samples"]["score"]
    some = harness.run_task(toy(), tokenizer, task, documents=7)
    assert some["n"] == 7
    assert some["samples"]["score"] == [whole[n * len(whole) // 7] for n in range(7)]
    assert len(set(some["samples"]["score"])) == 2


def test_without_a_chat_template_the_plain_text_is_scored(tmp_path: Path) -> None:
    model, tokenizer = toy(), character_tokenizer()
    tokenizer.chat_template = None
    docs = [{"question": f"{word} is", "choices": ["red", "blue", "a"], "answer": 1} for word in ("sky", "sea", "it")]
    kind = {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
    task = write_task(tmp_path / "tasks", "colours", docs, output_type="multiple_choice", **kind)
    expected = []
    for doc in docs:
        sums = []
        for choice in doc["choices"]:
            ids = tokenizer(f"{doc['question']} {choice}", add_special_tokens=False)["input_ids"]
            table = log_probs_by_hand(model, ids)
            places = range(len(doc["question"]), len(ids))
            sums.append(sum(table[place - 1, ids[place]].item() for place in places))
        expected.append(float(max(sums) == sums[1]))
    found = evaluate_one(model, tokenizer, [task], sizes=SIZES)[task]
    assert not found["chat_template"]
    assert found["samples"]["score"] == expected
    assert {"acc,none", "acc_norm,none"} <= set(found)  # the harness's own choice of figures


# ----------------------------------------------------------------------------------------- in the commands


def write_capitals(folder: Path) -> str:
    """A task in the words of make_model."""
    countries = ["france", "spain", "italy"]
    docs = [
        {"question": f"{start} the capital of {country}", "cities": ["paris", "madrid", "rome"], "right": place}
        for place, country in enumerate(countries)
        for start in ("what is", "say", "please say")
    ]
    kind = {"doc_to_text": "question", "doc_to_choice": "cities", "doc_to_target": "right"}
    return write_task(folder, "capitals", docs, output_type="multiple_choice", **kind)


def test_mtt_eval_prints_and_writes_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, task = make_model(tmp_path / "model"), write_capitals(tmp_path / "tasks")
    loaded, tokenizer = load_model(str(model))
    adapted = with_lora(loaded, moved=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    argv = ["eval", "--model", str(model), "--adapter", str(tmp_path / "adapter"), "--probes", task, "--quick"]
    assert main([*argv, "--output", str(tmp_path / "found.json")]) == 0
    arms = [arm["probes"][task] for arm in json.loads((tmp_path / "found.json").read_text())["arms"]]
    expected = evaluate_pair(adapted, tokenizer, probes=[task], sizes=ProbeSizes.quick())
    assert arms == [expected["base"][task], expected["adapted"][task]]
    base, change = arms[0], arms[1]["score"] - arms[0]["score"]
    assert change != 0
    lines = " ".join(capsys.readouterr().out.split())
    assert f"capitals acc ↑ {base['score']:.3f} ± {base['acc_stderr,none']:.3f} {arms[1]['score']:.3f} ± " in lines
    assert f"capitals acc: change ↑ {change:+.3f} ± {arms[1]['score_stderr']:.3f}" in lines


def test_data_that_is_not_there_is_told_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"not weights")
    assert main(["eval", "--model", str(model), "--probes", "lm_eval:hellaswag"]) == 2
    error = capsys.readouterr().err
    assert "lm_eval:hellaswag can't be loaded: Couldn't reach 'Rowan/hellaswag'" in error
    assert "Without a network, its data must be in the cache of 'datasets' before." in error


def test_a_study_measures_a_task_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = make_model(tmp_path / "model"), write_capitals(tmp_path / "tasks")
    given = {"probes": ["target", "text:python_docs", task], "methods": {"ce": {"method": "ce"}}, "scales": []}
    study = test_sweep.read(tmp_path, test_sweep.content(model, **given))
    assert study.probes == given["probes"]
    (result,) = sweep.run(study, tmp_path / "study")
    base, points = result["base"][task], [point["probes"][task] for point in result["points"]]
    tokenizer = load_model(str(model))[1]
    for found, step in ((base, None), (points[0], 2), (points[1], 4)):
        loaded = load_model(str(model))[0]
        if step is not None:
            loaded = PeftModel.from_pretrained(
                loaded, tmp_path / "study" / "runs" / result["key"] / f"checkpoint-{step}"
            )
        alone = harness.run_task(loaded, tokenizer, task.removeprefix(harness.PREFIX), documents=4)
        assert {key: value for key, value in found.items() if key != "score_stderr"} == {
            key: value for key, value in alone.items() if key != "samples"
        }
        assert ("score_stderr" in found) == (step is not None)
    with pytest.raises(ValueError, match=r"study\.yaml: probes: unknown task 'helaswag' of .*'hellaswag'"):
        test_sweep.read(tmp_path, test_sweep.content(model, probes=["target", "text", "lm_eval:helaswag"]))


# ---------------------------------------------------------------------------------------- all is as it was before


def states(model: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "training": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "weights": {name: value.sum().item() for name, value in model.state_dict().items()},
        "pad": tokenizer.pad_token,
        "padding": tokenizer.padding_side,
        "level": logging.getLogger("lm_eval").level,
        "environment": dict(os.environ),
        "streams": (sys.stdout, sys.stderr),
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_random_states_and_training_come_back_also_after_an_error(tmp_path: Path, autocast: torch.dtype | None) -> None:
    model, tokenizer = with_lora(toy(), lora_dropout=0.5, moved=0.3), character_tokenizer()
    model.get_submodule("base_model.model.model.layers.0").eval()  # a mixed state
    task = write_facts(tmp_path / "tasks", tokenizer).removeprefix(harness.PREFIX)
    assert tokenizer.pad_token is None  # the harness sets one
    before = states(model, tokenizer)
    first = harness.run_task(model, tokenizer, task, documents=9, autocast=autocast)
    assert states(model, tokenizer) == before
    assert harness.run_task(model, tokenizer, task, documents=9, autocast=autocast) == first

    def interrupt(*_: Any) -> None:
        assert random.getstate() != before["python"]
        raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        harness.run_task(model, tokenizer, task, documents=9, autocast=autocast)
    hook.remove()
    assert states(model, tokenizer) == before


def test_nothing_is_printed_without_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = character_tokenizer()
    task = write_facts(tmp_path / "tasks", tokenizer).removeprefix(harness.PREFIX)
    harness.run_task(toy(), tokenizer, task, documents=3)
    assert capfd.readouterr() == ("", "")
    harness.run_task(toy(), tokenizer, task, documents=3, progress=True)
    assert "loglikelihood" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("helaswag", r"unknown task 'helaswag' of lm-evaluation-harness\. Did you mean 'hellaswag' or "),
        ("humaneval", r"lm_eval:humaneval is refused: humaneval executes code that the model writes \(unsafe_code\)"),
        ("afriqa_bem_prompt_1", r"afriqa_bem_prompt_1 runs code of its data set \(trust_remote_code\)"),
        ("afriqa", r"lm_eval:afriqa is refused: afriqa_\w+ runs code of its data set"),
        ("polemo2_in", r"polemo2_in scores with 'f1', whose code the package evaluate downloads"),
        ("wmt-ro-en-t5-prompt", r"wmt-ro-en-t5-prompt scores with 'wer', whose code the package evaluate downloads"),
        ("openllm", r"lm_eval:openllm is a group without a figure of its own\. Ask for its members: arc_challenge, "),
        ("qqq~", r"'lm-eval ls tasks' lists all\. A task of your own: FILE\.yaml"),
    ],
)
def test_tasks_that_cannot_be_measured_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_probes(["text", f"lm_eval:{name}"])


def test_known_tasks_groups_and_tags_pass() -> None:
    found = check_probes(["lm_eval:hellaswag", "lm_eval:mmlu", "lm_eval:ai2_arc", "lm_eval:arc_easy"])
    assert found == ["lm_eval:hellaswag", "lm_eval:mmlu", "lm_eval:arc_challenge", "lm_eval:arc_easy"]


def test_task_files_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no task file '\S+none\.yaml'"):
        check_probes([f"lm_eval:{tmp_path}/none.yaml"])
    for text, message in (
        ("task: [1", r"bad\.yaml is not a task file: while parsing"),
        ("- one", r"bad\.yaml is not a task file: Expected YAML dict"),
        ("output_type: multiple_choice", r"bad\.yaml is not a task file: it has neither 'task' nor 'group'"),
        ("task: x\nunsafe_code: true", r"bad\.yaml is refused: x executes code that the model writes"),
        ("task: x\ndataset_kwargs: {trust_remote_code: true}", r"x runs code of its data set"),
        ("group: g\naggregate_metric_list: [{metric: acc}]\ntask: [{task: x, unsafe_code: true}]", r"x executes code"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            check_probes([f"lm_eval:{tmp_path}/bad.yaml"])
    task = write_task(tmp_path / "tasks", "lost", [{"a": "b"}], doc_to_text="a", doc_to_target="a")
    (tmp_path / "tasks" / "lost.jsonl").unlink()
    assert check_probes([task]) == [task]
    with pytest.raises(ValueError, match=r"lost\.yaml can't be loaded: Unable to find '\S+lost\.jsonl'"):
        evaluate_one(toy(), character_tokenizer(), [task], sizes=SIZES)


def test_a_task_too_long_for_the_model_is_a_sentence(tmp_path: Path) -> None:
    docs = [{"question": "a", "answer": "b"}]
    kind = {"doc_to_text": "question", "doc_to_target": "answer", "generation_kwargs": {"max_gen_toks": 600}}
    task = write_task(tmp_path / "tasks", "long", docs, output_type="generate_until", **kind)
    with pytest.raises(ValueError, match=r"long\.yaml can't be run on this model: .*generate \(600\) must be less"):
        evaluate_one(toy(), character_tokenizer(), [task], sizes=SIZES)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"lm_eval:hellaswag.*pip install 'mask-the-target\[eval\]'"):
        check_probes(["lm_eval:hellaswag"])
    assert check_probes(["facts"]) == ["facts"]
