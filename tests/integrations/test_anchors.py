"""Anchors that the base writes, how they get into batches, and the budget that sets their weight."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from conftest import toy_llama, with_lora
from integrations.test_transformers import CHATS, _arguments, _logged, _tokenizer
from mask_the_target import TMKL, Anchors, CachedBase, TMKLCallback
from mask_the_target.anchors import AnchorCollator, load_anchors, save_anchors, write_anchors
from mask_the_target.attach import Totals, attach
from mask_the_target.base import adapters_off
from mask_the_target.budget import PATIENCE, DriftBudget
from mask_the_target.files import write_whole
from reference import reference_loss

OPTIONS = TMKL(weight=0.5, context_weight=0.8)
TEXTS = [{"text": " ".join(f"w{(i * j) % 42}" for j in range(1, 5 + i % 9))} for i in range(16)]


# ---------------------------------------------------------------------------------------------------------- writing


def test_the_base_writes_them_whatever_the_adapter_has_become() -> None:
    """The same from the base alone, the same again, and no random number or training flag of the run is moved."""
    base, tokenizer = toy_llama(), _tokenizer()
    model = with_lora(copy.deepcopy(base), moved=0.5)
    state = torch.get_rng_state()
    asked: dict[str, Any] = {"count": 24, "length": 8, "progress": False}
    rows = write_anchors(model.get_base_model(), tokenizer, **asked, context=lambda: adapters_off(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert rows == write_anchors(base, tokenizer, **asked)
    assert rows != write_anchors(model.get_base_model(), tokenizer, **asked)  # with the adapter, another model writes
    assert rows != write_anchors(base, tokenizer, **asked, seed=1)
    assert len({row["text"] for row in rows}) == len(rows) == 24
    assert {(row["start"], row["temperature"]) for row in rows} == {
        (start, temperature) for start in ("chat", "text") for temperature in (0.7, 1.0)
    }
    for row in rows:
        begins = "<user>" if row["start"] == "chat" else "<bos>"
        assert row["text"].split()[0] == begins
        assert ("<assistant>" in row["text"]) or row["start"] == "text"


def test_without_a_template_all_are_texts_and_a_model_that_repeats_itself_writes_fewer() -> None:
    tokenizer = _tokenizer()
    tokenizer.chat_template = None
    with pytest.warns(UserWarning, match="1 different anchors of 8: the model repeats itself"):
        rows = write_anchors(toy_llama(), tokenizer, 8, length=4, temperatures=(1e-4,), progress=False)
    assert len(rows) == 1
    assert {row["start"] for row in rows} == {"text"}


def test_a_tokenizer_without_any_special_token_is_refused() -> None:
    tokenizer = _tokenizer()
    tokenizer.chat_template = tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no token that begins a text"):
        write_anchors(toy_llama(), tokenizer, 4, progress=False)


# ---------------------------------------------------------------------------------------------------------- reading


def test_what_is_written_is_read_again_and_files_of_a_user_may_have_three_forms(tmp_path: Path) -> None:
    tokenizer, file = _tokenizer(), tmp_path / "anchors.jsonl"
    rows = write_anchors(toy_llama(), tokenizer, 8, length=6, progress=False)
    save_anchors(rows, file)
    assert [tokenizer.decode(ids) for ids in load_anchors(file, tokenizer)] == [
        " ".join(row["text"].split()) for row in rows
    ]
    user, assistant = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}
    given = [
        {"text": "w1 w2 w3"},
        {"messages": [user, assistant]},
        {"prompt": [user], "completion": [assistant]},
        {"prompt": "w1", "completion": " w2"},
        {"text": "w1"},  # one token predicts nothing
    ]
    save_anchors(given, file)
    chat = tokenizer("<user> w1 w2 <assistant> w3 <eos>", add_special_tokens=False)["input_ids"]
    assert load_anchors(file, tokenizer) == [
        tokenizer("w1 w2 w3")["input_ids"],
        chat,
        chat,
        tokenizer("w1 w2")["input_ids"],
    ]
    assert load_anchors(file, tokenizer, max_length=2)[1] == chat[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "w1 w2"}\n{"words": 3}\n', r"line 2: an anchor needs 'text', 'messages', or 'prompt'"),
        ('{"text": "w1 w2"}\n{"text": ', "line 2: not a line of JSON"),
        ('{"text": "w1"}\n', "holds no sequence of at least two tokens"),
    ],
)
def test_files_that_hold_no_anchors(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_anchors(tmp_path / "bad.jsonl", _tokenizer())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.0}, r"share=1.0 must lie between 0 and 1"),
        ({"count": 1}, r"count=1 must be at least 2"),
        ({"source": "none.jsonl"}, r"there is no file 'none.jsonl'. Write one with mtt anchors"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anchors(**values)


def test_without_a_context_weight_they_would_hold_nothing() -> None:
    with pytest.raises(ValueError, match=r"anchors='auto' without a context_weight has no effect"):
        TMKLCallback(anchors="auto")
    with pytest.raises(ValueError, match=r"max_drift=0.1 without a context_weight has no effect"):
        TMKLCallback(max_drift=0.1)


# ----------------------------------------------------------------------------------------------------------- mixing


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return DataCollatorForSeq2Seq(_tokenizer(), padding=True)(rows)


@settings(max_examples=25, deadline=None)
@given(
    share=st.floats(0.05, 0.7),
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    seed=st.integers(0, 3),
)
def test_their_share_of_the_tokens_is_right_on_average(share: float, lengths: list[int], seed: int) -> None:
    anchors = [[7] * length for length in (2, 9, 40)]
    collator = AnchorCollator(_collate, anchors, share, seed)
    added = []
    for start in range(400):
        rows = [{"input_ids": [1 + start % 40, start // 40 + 1, *[3] * (n - 2)]} for n in lengths]
        chosen = collator._chosen(rows, collator._joined(rows))
        added.append(sum(map(len, chosen)))
    wanted = sum(lengths) * share / (1 - share)
    assert wanted < 40 or min(added)  # none is longer than that, so each batch has some
    assert abs(statistics.fmean(added) - wanted) < 5 * statistics.stdev(added) / 20 + 1e-9


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
)
def test_short_anchors_share_rows_of_nearly_the_longest_documents_length(lengths: list[int]) -> None:
    """Each whole, in order; two neighbours would not fit into one row; few kinds of rows for any documents."""
    anchors = [[5 + place] * n for place, n in enumerate(lengths)]
    collator = AnchorCollator(_collate, anchors)
    for length in range(2, 301):
        rows = collator._joined([{"input_ids": [1] * length}] * 3)  # the share's third is as long
        assert [token for row in rows for token in row] == [token for ids in anchors for token in ids]
        whole = [ids for ids in anchors if len(ids) > length]
        assert all(len(row) <= length or row in whole for row in rows)
        for one, following in itertools.pairwise(rows):
            assert len(one) + following.count(following[0]) > 0.75 * length
    assert len(collator._of_length) <= 32  # of 299
    assert anchors == [[5 + place] * n for place, n in enumerate(lengths)]


def test_the_rows_of_the_data_stay_as_they_are_and_anchors_have_no_target() -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 5], "labels": [-100, 5]}]
    for extra in ({}, {"attention_mask": 1}, {"completion_mask": 1}):
        given = [row | {name: [value] * len(row["input_ids"]) for name, value in extra.items()} for row in rows]
        if "completion_mask" in extra:
            with pytest.raises(ValueError):  # this collator can't pad it; what TRL's makes of it is below
                AnchorCollator(_collate, [[10, 11, 12]], 0.5)(given)
            continue
        batch = AnchorCollator(_collate, [[10, 11, 12]], 0.5)(given)
        plain = _collate(given)
        assert torch.equal(batch["input_ids"][:2, :4], plain["input_ids"])
        assert torch.equal(batch["labels"][:2, :4], plain["labels"])
        assert len(batch["input_ids"]) > 2
        assert (batch["labels"][2:] == -100).all()
        assert (batch["input_ids"][2:, :3] == torch.tensor([10, 11, 12])).all()
        again = AnchorCollator(_collate, [[10, 11, 12]], 0.5)(given)
        assert torch.equal(batch["input_ids"], again["input_ids"])


@pytest.mark.parametrize(
    ("padding_free", "extra", "length"), [(False, {}, 24), (True, {}, 3), (False, {"seq_lengths": [40]}, 3)]
)
def test_anchors_share_no_row_where_rows_are_not_padded(padding_free: bool, extra: dict[str, Any], length: int) -> None:
    seen: list[list[dict[str, Any]]] = []

    class Collator:
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
            seen.append(rows)
            return {"labels": torch.tensor([label for row in rows for label in row["labels"]])}

    collator = Collator()
    collator.padding_free = padding_free  # type: ignore[attr-defined]
    row = {"input_ids": [5] * 40, "labels": [5] * 40} | extra
    AnchorCollator(collator, [[10, 11, 12]] * 8, 0.5)([row, row])
    assert {len(added["input_ids"]) for added in seen[0][2:]} == {length}


def test_features_of_other_kinds_may_be_there_and_empty() -> None:
    """As in LLaMA-Factory's rows: images of a text."""
    seen: list[Any] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append([row.pop("images") for row in rows])
        return _collate(rows)

    rows: list[dict[str, Any]] = [{"input_ids": [5, 6], "labels": [-100, 6], "images": empty} for empty in (None, [])]
    AnchorCollator(collate, [[10, 11]], 0.5)(rows)
    assert seen[0][:2] == [None, []]
    assert seen[0][2:] == [None] * (len(seen[0]) - 2) != []
    rows[1]["images"] = ["one"]
    with pytest.raises(ValueError, match="their rows hold images, which an anchor of text alone"):
        AnchorCollator(collate, [[10, 11]], 0.5)(rows)


def test_collators_and_rows_that_anchors_do_not_fit_are_refused() -> None:
    causal = DataCollatorForLanguageModeling(_tokenizer(), mlm=False)
    with pytest.raises(ValueError, match=r"makes 3 targets of the anchors' tokens"):
        AnchorCollator(causal, [[10, 11, 12]], 0.5)([{"input_ids": [5, 6, 7]}])
    with pytest.raises(ValueError, match=r"the collator can't pad labels, .*DataCollatorForSeq2Seq"):
        AnchorCollator(causal, [[10, 11, 12]], 0.6)([{"input_ids": [5, 6, 7, 8, 9]}])
    late = AnchorCollator(causal, [[10] * 8], 0.2)
    assert len(late([{"input_ids": [5, 6]}])["labels"]) == 1  # no anchor in this batch, and nothing to see
    with pytest.raises(ValueError, match=r"makes \d+ targets of the anchors' tokens"):
        [late([{"input_ids": torch.randint(3, 47, (8,)).tolist()}]) for _ in range(100)]
    with pytest.raises(ValueError, match="their rows hold pixel_values, which an anchor of text alone"):
        AnchorCollator(_collate, [[10, 11]], 0.5)([{"input_ids": [5, 6], "labels": [5, 6], "pixel_values": 1}])


# --------------------------------------------------------------------------------------------------------- training


def _sft(tmp_path: Path, rows: list[dict[str, Any]], callback: TMKLCallback, **kwargs: Any) -> SFTTrainer:
    return SFTTrainer(
        toy_llama(),
        _arguments(tmp_path, SFTConfig, **({"max_length": 64} | kwargs)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
        callbacks=[callback],
    )


@pytest.mark.parametrize(
    ("rows", "kwargs"),
    [
        (TEXTS, {}),  # plain documents: every position has a target, so all that is held are anchors
        (TEXTS, {"packing": True, "max_length": 32}),
        (TEXTS, {"padding_free": True, "max_length": None}),
        ([{"prompt": p, "completion": c} for p, c in CHATS], {"completion_only_loss": True}),
        ([{"messages": p + c} for p, c in CHATS], {"assistant_only_loss": True, "gradient_accumulation_steps": 2}),
    ],
    ids=["texts", "packed", "padding-free", "completions", "messages"],
)
def test_the_trainer_trains_on_the_reference_loss_of_batches_with_anchors(
    tmp_path: Path, rows: list[dict[str, Any]], kwargs: dict[str, Any]
) -> None:
    callback = TMKLCallback(OPTIONS, anchors=Anchors(share=0.4, count=12, length=8))
    trainer = _sft(tmp_path, rows, callback, max_steps=2, **kwargs)
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
    training_step = trainer.training_step

    def step(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        keys = ("input_ids", "attention_mask", "position_ids", "labels")
        data = {k: v.clone() for k, v in inputs.items() if k in keys}
        seen.append((data, copy.deepcopy({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})))
        return training_step(model, inputs, num_items_in_batch)

    trainer.training_step = step
    trainer.train()
    per_step = kwargs.get("gradient_accumulation_steps", 1)
    written = {tuple(ids) for ids in load_anchors(next(tmp_path.glob("anchors-*.jsonl")), _tokenizer())}
    fresh, found = with_lora(toy_llama()), set()
    for index, entry in enumerate(_logged(trainer)):
        batches = seen[index * per_step : (index + 1) * per_step]
        fresh.load_state_dict(batches[0][1], strict=False)
        results = [reference_loss(fresh, toy_llama(), data, OPTIONS) for data, _ in batches]
        items = [int((data["labels"][..., 1:] != -100).sum()) for data, _ in batches]
        context = [int(r.context) for r in results]
        for name, counts in (("ce", items), ("kl", items), ("context_kl", context)):
            mean = sum(float(getattr(r, name)) * n for r, n in zip(results, counts, strict=True)) / sum(counts)
            assert entry[name] == pytest.approx(mean, rel=1e-3, abs=2e-6), name
        assert sum(context) > 0
        for data, _ in batches:
            ids = data["input_ids"].reshape(-1).tolist()
            found |= {one for one in written if any(tuple(ids[i : i + len(one)]) == one for i in range(len(ids)))}
    assert found  # anchors are in the batches, and evaluation has none of them
    evaluated = next(iter(trainer.get_eval_dataloader()))
    assert (evaluated["labels"] != -100).sum(1).min() > 0 if "attention_mask" in evaluated else True
    assert "get_train_dataloader" in vars(trainer)


def test_what_is_held_is_held_and_what_is_learned_is_learned(tmp_path: Path) -> None:
    """With anchors, plain documents drift less at other anchors that the base wrote, at the same data and steps."""
    drift = []
    others = [
        ids
        for row in write_anchors(toy_llama(), _tokenizer(), 32, length=8, seed=5, progress=False)
        for ids in [_tokenizer()(row["text"], add_special_tokens=False)["input_ids"]]
    ]
    for anchors in (None, Anchors(share=0.5, count=64, length=8)):
        options = TMKL(weight=0.0, context_weight=5.0) if anchors else TMKL(weight=0.0)
        trainer = _sft(
            tmp_path / str(anchors is None),
            TEXTS,
            TMKLCallback(options, anchors=anchors),
            max_steps=40,
            optim="adamw_torch",
            learning_rate=5e-3,
        )
        trainer.train()
        model, base = trainer.model.eval(), toy_llama().eval()
        kls = []
        with torch.no_grad():
            for ids in others:
                p, q = (one(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1) for one in (base, model))
                kls.append((p.exp() * (p - q)).sum(-1).mean().item())
        drift.append(statistics.fmean(kls))
        assert _logged(trainer)[-1]["ce"] < 0.97 * _logged(trainer)[0]["ce"]
    assert drift[1] < 0.5 * drift[0]


def test_anchors_need_a_trainer_with_model_and_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="anchors need the model and its tokenizer when the trainer is built"):
        Trainer(
            model=with_lora(toy_llama()),
            args=_arguments(tmp_path),
            train_dataset=[],
            callbacks=[TMKLCallback(OPTIONS, anchors="auto")],
        )


def test_a_trainer_whose_loader_collates_in_its_own_way_is_stopped_before_its_first_step(tmp_path: Path) -> None:
    class OwnLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_size=2, collate_fn=collator)

    tokenizer = _tokenizer()
    collator = DataCollatorForSeq2Seq(tokenizer)
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ([1, 5, 6, 7], [1, 8, 9])]
    trainer = OwnLoader(
        model=with_lora(toy_llama()),
        args=_arguments(tmp_path, max_steps=1),
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[TMKLCallback(OPTIONS, anchors=Anchors(count=4, length=4))],
    )
    with pytest.raises(RuntimeError, match=r"get_train_dataloader doesn't collate with its data_collator"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_file_that_can_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "anchors.jsonl").mkdir()
    with pytest.raises(OSError, match=r"anchors\.jsonl"):
        write_whole(tmp_path / "anchors.jsonl", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["anchors.jsonl"]


def test_a_cached_base_stays_on_beside_anchors_that_are_cut_to_many_lengths(tmp_path: Path) -> None:
    """A batch whose anchor is new is computed whole, and its rows that were there already count as no new data."""
    random = torch.Generator().manual_seed(0)

    def words(least: int, most: int) -> str:
        count = int(torch.randint(least, most, (1,), generator=random))
        return " ".join(f"w{int(w)}" for w in torch.randint(0, 42, (count,), generator=random))

    rows = [{"prompt": words(5, 21), "completion": f" {words(5, 31)}"} for _ in range(160)]
    written = [{"text": words(10, 25), "start": "text", "temperature": 1.0} for _ in range(64)]
    save_anchors(written, tmp_path / "anchors.jsonl")
    base = CachedBase(folder=str(tmp_path / "cache"))
    callback = TMKLCallback(OPTIONS, base=base, anchors=Anchors(tmp_path / "anchors.jsonl"))
    more = {"num_train_epochs": 3, "per_device_train_batch_size": 8}
    trainer = _sft(tmp_path, rows, callback, max_steps=-1, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="base='cached' is off")
        trainer.train()


# ----------------------------------------------------------------------------------------------------------- budget


def test_a_budget_moves_its_weight_as_said() -> None:
    budget = DriftBudget(max_drift=0.1, weight=2.0)
    for _ in range(PATIENCE):
        assert budget.update(0.0) == 2.0
    assert budget.update(0.0) == pytest.approx(2.0 * math.exp(-2 * 0.08 - 2), rel=1e-12)
    assert budget.update(10.0) == pytest.approx(2.0 * math.exp(-2 * 0.08 + 2 * 0.08 + 2), rel=1e-12)  # KL: 2 smoothed
    assert budget.kl == pytest.approx(2.0)
    budget = DriftBudget(**asdict(budget))  # what a checkpoint keeps is all of it
    assert budget.update(0.1) == pytest.approx(2.0 * math.exp(2 * 0.08 + 2), rel=1e-12)
    for _ in range(60):
        budget.update(0.1)
    assert budget.weight == pytest.approx(budget.total, rel=1e-2)  # at the budget, it stays what it is
    steady = budget.weight
    budget.update(0.1)
    assert budget.weight == pytest.approx(steady, rel=1e-2)
    assert budget.missed is None
    low = budget.weight
    budget.update(float("nan"))
    assert (budget.weight, budget.steps) == (low, PATIENCE + 64)
    for _ in range(9000):
        budget.update(0.0)
    assert budget.weight == 1e-4  # there is a way back
    for _ in range(400):
        budget.update(10.0)
    assert budget.weight == 2.0 * 1e4
    assert "above the budget max_drift=0.1, with a weight of 2e+04" in (budget.missed or "")
    for name, value in (("max_drift", 0.0), ("weight", -1.0), ("max_drift", float("inf"))):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            DriftBudget(**({"max_drift": 0.1} | {name: value}))


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_a_budget_is_met_from_any_start_and_kept_in_checkpoints(tmp_path: Path, start: float) -> None:
    rows = [{"prompt": p, "completion": c} for p, c in CHATS]
    more: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 5e-3, "completion_only_loss": True}
    options, limit = TMKL(weight=0.0, context_weight=start), 0.02
    trainer = _sft(tmp_path / "whole", rows, TMKLCallback(options, max_drift=limit), max_steps=200, **more)
    trainer.train()
    logs = _logged(trainer)
    last = statistics.fmean(entry["context_kl"] for entry in logs[-50:])
    assert 0.75 * limit < last < 1.25 * limit
    assert logs[0]["context_weight"] == start
    if start != 1.0:
        return
    # Stopped and gone on with, the weight and the KL are those of the run that was not.
    more |= {"save_strategy": "steps", "save_steps": 7}
    cut = _sft(tmp_path / "cut", rows, TMKLCallback(options, max_drift=limit), max_steps=200, **more)
    cut.add_callback(_Stop(7))
    cut.train()
    kept = json.loads((tmp_path / "cut/checkpoint-7/drift_budget.json").read_text())
    assert kept["steps"] == 7
    on = _sft(tmp_path / "cut", rows, TMKLCallback(options, max_drift=limit), max_steps=200, **more)
    on.add_callback(_Stop(20))
    on.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-7"))
    for entry, other in zip(logs[7:20], _logged(on)[-13:], strict=True):
        assert entry["step"] == other["step"]
        assert other["context_weight"] == pytest.approx(entry["context_weight"], rel=1e-4)


def test_each_node_keeps_a_budget_in_checkpoints_of_its_own(tmp_path: Path) -> None:
    callback = TMKLCallback(TMKL(context_weight=1.0), max_drift=0.01)
    callback._budget = DriftBudget(0.01, 3.0)
    other_node = TrainerState(global_step=5, is_world_process_zero=False)
    callback.on_save(_arguments(tmp_path, save_on_each_node=True), other_node, TrainerControl())
    assert json.loads((tmp_path / "checkpoint-5/drift_budget.json").read_text())["weight"] == 3.0


def test_a_step_that_is_no_number_is_left_out_of_the_budget_and_stays_in_the_log() -> None:
    callback = TMKLCallback(TMKL(context_weight=1.0), max_drift=0.01)
    with attach(with_lora(toy_llama()), TMKL(context_weight=1.0)) as attachment:
        found = []
        for kl in (1.0, float("nan"), 2.0, 2.0):
            attachment.totals = attachment.totals + Totals(
                forwards=1, context_kl=torch.tensor(kl), context=torch.tensor(10)
            )
            found.append(callback._step_kl(attachment))
    assert found == pytest.approx([0.1, float("nan"), 0.2, 0.2], nan_ok=True)
    assert callback._totals.forwards == 4
    assert torch.isnan(torch.as_tensor(callback._totals.context_kl))


def test_a_budget_lies_in_the_checkpoint_of_a_searchs_trial_and_is_read_where_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    rows = [{"prompt": p, "completion": c} for p, c in CHATS]
    options = TMKL(weight=0.0, context_weight=1.0)
    more: dict[str, Any] = {"completion_only_loss": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}

    def trainer(folder: str, **changes: Any) -> SFTTrainer:
        return _sft(tmp_path / folder, rows, TMKLCallback(options, max_drift=1e-6), **(more | changes))

    search = trainer("search")
    model = search.model
    search.model_init = lambda trial: model
    search.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=1,
        backend="optuna",
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    files = [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("drift_budget.json")]
    assert files == ["search/run-0/checkpoint-2/drift_budget.json"]
    kept = json.loads((tmp_path / files[0]).read_text())
    on = trainer("elsewhere", max_steps=3, save_strategy="no")
    on.train(resume_from_checkpoint=str(tmp_path / "search/run-0/checkpoint-2"))
    assert _logged(on)[-1]["step"] == 3
    budget = DriftBudget(**kept)
    assert on.callback_handler.callbacks[0]._budget.steps == budget.steps + 1


def test_a_budget_that_can_not_be_met_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": c} for p, c in CHATS]
    callback = TMKLCallback(TMKL(weight=0.0, context_weight=1e-6), max_drift=1e-7)
    more: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 5e-2, "completion_only_loss": True}
    trainer = _sft(tmp_path, rows, callback, max_steps=5, **more)
    with pytest.warns(UserWarning, match=r"above the budget max_drift=1e-07"):
        trainer.train()


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control
