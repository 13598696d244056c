"""Training with the base's hidden states from disk: the same losses, and no base pass once they are there."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments

from conftest import SIZES, move, toy_llama, with_lora
from mask_the_target import TMKL, CachedBase, TMKLCallback, attach
from mask_the_target.base import adapter_layers


@contextmanager
def base_passes(model: PeftModel) -> Iterator[list[int]]:
    """Counts forwards without gradient: those of the base."""
    count: list[int] = []

    def note(module: torch.nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            count.append(1)

    hook = model.get_base_model().model.layers[0].register_forward_pre_hook(note)
    yield count
    hook.remove()


def documents(count: int = 6, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 48, (4 + 2 * i,), generator=g) for i in range(count)]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Right-padded to the longest of the batch, so that a row's padding depends on its company."""
    length = max(map(len, rows))
    ids, mask, labels = (torch.full((len(rows), length), fill) for fill in (0, 0, -100))
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, 2 : len(tokens)] = tokens[2:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(rows: list[Tensor]) -> dict[str, Tensor]:
    """One row without padding, as TRL's padding-free collator makes it."""
    labels = torch.cat([torch.cat([torch.full((2,), -100), tokens[2:]]) for tokens in rows])
    positions = torch.cat([torch.arange(len(tokens)) for tokens in rows])
    return {"input_ids": torch.cat(rows)[None], "position_ids": positions[None], "labels": labels[None]}


EPOCHS = ([[0, 1, 2], [3, 4, 5]], [[5, 0, 3], [2, 4, 1]], [[4, 5, 1], [0, 2, 3]])


def train(model: PeftModel, collate: Any, epochs: Any = EPOCHS, rate: float = 0.05) -> list[float]:
    rows, losses = documents(), []
    weights = [p for p in model.parameters() if p.requires_grad]
    for batches in epochs:
        for chosen in batches:
            loss = model(**collate([rows[i] for i in chosen])).loss
            losses.append(float(loss.detach()))
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.data -= rate * gradient
    return losses


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("collate", [padded, packed])
def test_the_losses_are_the_same_and_the_base_runs_in_the_first_epoch_only(
    collate: Any, init: Any, tmp_path: Path
) -> None:
    expected_model, model = (with_lora(toy_llama(), init_lora_weights=init) for _ in range(2))
    with attach(expected_model):
        expected = train(expected_model, collate)
    with attach(model, base=CachedBase(folder=tmp_path)) as attachment, base_passes(model) as passes:
        first = train(model, collate, EPOCHS[:1])
        after_first = len(passes)
        later = train(model, collate, EPOCHS[1:])
    assert first + later == pytest.approx(expected, rel=1e-5)
    assert float(attachment.last.kl) > 1e-3  # it did train
    assert attachment.base.kind == ("off" if init is True else "initial")
    # Two to see that it is deterministic, one a batch, and with packing two more to see that documents are apart.
    assert after_first == 2 + len(EPOCHS[0]) + (2 if collate is packed else 0)
    assert len(passes) == after_first


def test_a_later_run_finds_them_and_another_base_does_not(tmp_path: Path) -> None:
    with attach(with_lora(toy_llama()), base=CachedBase(folder=tmp_path)) as attachment:
        for chosen in EPOCHS[0]:
            attachment.fill_cache(padded([documents()[i] for i in chosen]))
    for moved, of_the_batches in ((False, 0), (True, 2), (True, 0), (False, 0)):
        model = with_lora(toy_llama())
        if moved:
            with torch.no_grad():
                model.get_base_model().model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
        with attach(model, base=CachedBase(folder=tmp_path)), base_passes(model) as passes:
            train(model, padded, EPOCHS[1:2])
        assert len(passes) == 2 + of_the_batches  # two to see that it is deterministic
    assert len(list(tmp_path.iterdir())) == 2


def test_an_initial_adapter_that_is_on_or_scaled_differently_is_another_base(tmp_path: Path) -> None:
    """The weights are the same ones. Nothing has been trained, so the KL is 0."""
    for chosen, factor in (("default", 1.0), ("other", 1.0), ("default", 2.0), ("default", 1.0)):
        model = with_lora(toy_llama())
        model.add_adapter("other", model.peft_config["default"])
        move(model, 0.3)
        move(model, 0.3, seed=2)
        model.set_adapter(chosen)
        for layer in adapter_layers(model):
            layer.scaling[chosen] *= factor
        with attach(model, base=CachedBase("initial", folder=tmp_path)) as attachment:
            model(**padded(documents()))
            assert float(attachment.last.kl) == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_documents_that_follow_their_place_in_the_row_are_not_taken_apart(tmp_path: Path) -> None:
    """Llama 4's temperatures of attention, which are those of the row's positions."""
    settings = {"intermediate_size_mlp": 32, "num_local_experts": 2, "moe_layers": [], "head_dim": 4}
    settings |= {
        "floor_scale": 4,
        "attn_scale": 2.0,
        "attn_temperature_tuning": True,
        "no_rope_layers": [0, 0],
        "use_qk_norm": False,
    }
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**(SIZES | settings))
    model = with_lora(transformers.Llama4ForCausalLM(config), target_modules=["q_proj"])
    batches = [packed([documents()[i] for i in chosen]) for chosen in ([0, 3], [1, 4], [1, 3])]
    with attach(model, base=CachedBase(folder=tmp_path)) as attachment:
        for inputs in batches:
            model(**inputs)
            assert float(attachment.last.kl) == 0


def test_documents_that_see_each_other_are_not_taken_apart(tmp_path: Path) -> None:
    """With an explicit mask transformers doesn't separate packed documents: their states depend on their company."""

    def mixed(rows: list[Tensor]) -> dict[str, Tensor]:
        batch = packed(rows)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    expected_model, model = with_lora(toy_llama()), with_lora(toy_llama())
    with attach(expected_model):
        expected = train(expected_model, mixed)
        apart = float(expected_model(**packed(documents()[:3])).loss.detach())
        assert apart != pytest.approx(float(expected_model(**mixed(documents()[:3])).loss.detach()), rel=1e-3)
    with attach(model, base=CachedBase(folder=tmp_path)) as attachment, base_passes(model) as passes:
        attachment.fill_cache(packed(documents()[:3]))  # proves that without a mask they are apart, which says nothing
        assert train(model, mixed) == pytest.approx(expected, rel=1e-5)
        before = len(passes)
        train(model, mixed, EPOCHS)  # the same rows again, whole: found
    assert len(passes) == before


@pytest.mark.parametrize("mask_first", [False, True])
def test_rows_whose_documents_may_see_each_other_or_not_are_not_taken_for_each_other(
    mask_first: bool, tmp_path: Path
) -> None:
    """With a mask they do, and without one not; also where a row ends in a prompt that was cut, without a target."""
    ids = torch.randint(3, 47, (1, 18), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :2] = labels[:, 6:8] = labels[:, 12:] = -100
    packed_row = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(6).repeat(3)[None]}
    joined = packed_row | {"attention_mask": torch.ones_like(ids)}
    found = []
    for data in (joined, packed_row) if mask_first else (packed_row, joined):
        expected_model, model = with_lora(toy_llama(), moved=0.3), with_lora(toy_llama(), moved=0.3)
        with attach(expected_model) as attachment:
            expected_model(**data)
            assert attachment.last is not None
            expected = float(attachment.last.kl)
        with attach(model, base=CachedBase(folder=tmp_path)) as attachment:
            model(**data)
            assert attachment.last is not None
            assert float(attachment.last.kl) == pytest.approx(expected, rel=1e-5)
        found.append(expected)
    assert found[0] != pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_storage_gives_the_same_losses_to_its_rounding_in_every_epoch(autocast: bool, tmp_path: Path) -> None:
    model = with_lora(toy_llama(), moved=0.05)
    batch = padded(documents()[:3])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        with attach(model):
            model(**batch)
            expected = float(model(**batch).loss)
        with attach(model, base=CachedBase(folder=tmp_path, dtype="bfloat16")):
            first, later = float(model(**batch).loss), float(model(**batch).loss)
    assert first == later
    assert first == pytest.approx(expected, rel=2e-3)


def test_inputs_that_cannot_be_cached_run_uncached_after_one_warning(tmp_path: Path) -> None:
    model = with_lora(toy_llama(), moved=0.05)
    batch = padded(documents()[:3])
    embeddings = model.get_input_embeddings()
    embedded = {**batch, "inputs_embeds": embeddings(batch["input_ids"]).detach()}
    del embedded["input_ids"]
    with attach(model):
        expected = float(model(**batch).loss.detach())
    with attach(model, base=CachedBase(folder=tmp_path)):
        with pytest.warns(UserWarning, match="the batch holds no input_ids.*Use base='auto'"):
            assert float(model(**embedded).loss.detach()) == pytest.approx(expected, rel=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert float(model(**embedded).loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert not list(tmp_path.iterdir())

    with attach(model, base=CachedBase(folder=tmp_path)) as attachment:
        axes = {"input_ids": batch["input_ids"], "position_ids": torch.zeros(3, *batch["input_ids"].shape).long()}
        answer = torch.randn(2, 16)
        with pytest.warns(UserWarning, match=r"position_ids \[3, 3, 8\] are not \[batch, sequence\]"):
            assert attachment.cache.hidden(axes, torch.tensor([1, 2]), lambda inputs: answer) is answer
    assert not list(tmp_path.iterdir())

    with attach(model, base=CachedBase(folder=tmp_path)):
        # Switched on after the probe, which refuses a loss that changes by itself.
        hook = embeddings.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
        with pytest.warns(UserWarning, match="two base passes.*differ"):
            model(**batch)
    hook.remove()
    assert not list(tmp_path.iterdir())


def _rows(count: int) -> list[dict[str, list[int]]]:
    return [{k: v[0].tolist() for k, v in padded([tokens]).items()} for tokens in documents(count)]


class _Table(torch.utils.data.Dataset):
    """What the callback reads of a data set's columns, over plain rows."""

    def __init__(self, rows: list[dict[str, list[int]]], augment: bool = False) -> None:
        self.rows, self.augment, self.column_names = rows, augment, ["input_ids", "labels"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, str):
            return [row[item] for row in self.rows]
        row = dict(self.rows[item])
        if self.augment:
            row["input_ids"] = [row["input_ids"][0], *torch.randint(3, 48, (len(row["labels"]) - 1,)).tolist()]
        return row


def _trainer(tmp_path: Path, base: Any, augment: bool = False) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, num_train_epochs=4, logging_steps=1,
        report_to=[], use_cpu=True, learning_rate=0.01, disable_tqdm=True, seed=3,
    )  # fmt: skip

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return padded([torch.tensor(row["input_ids"]) for row in rows])

    model = with_lora(toy_llama())
    callback = TMKLCallback(TMKL(), base=base)
    return Trainer(
        model=model, args=settings, train_dataset=_Table(_rows(6), augment), data_collator=collate, callbacks=[callback]
    )


def test_the_trainer_trains_the_same_with_the_cache_and_announces_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = []
    for base in ("auto", CachedBase(folder=tmp_path / "cache")):
        trainer = _trainer(tmp_path, base)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    tokens = sum(len(tokens) - 2 for tokens in documents(6))
    assert f"hidden states of {tokens} tokens (16 x torch.float32 each) take" in capsys.readouterr().err


def test_an_epoch_that_is_too_large_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, CachedBase(folder=tmp_path / "cache", limit_gib=1e-7))
    with pytest.raises(ValueError, match=r"over the limit of.*limit_gib= allows more"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_sequences_that_change_from_epoch_to_epoch_are_noticed(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, CachedBase(folder=tmp_path / "cache"), augment=True)
    with pytest.warns(UserWarning, match="the sequences differ from epoch to epoch"):
        trainer.train()
    assert trainer.state.global_step == 12


def test_filling_it_beforehand(tmp_path: Path) -> None:
    model = with_lora(toy_llama())
    rows = documents()
    with attach(model, base=CachedBase(folder=tmp_path)) as attachment, base_passes(model) as passes:
        for chosen in EPOCHS[0]:
            attachment.fill_cache(padded([rows[i] for i in chosen]))
        before = len(passes)
        train(model, padded, EPOCHS)
    assert len(passes) == before
    with attach(model) as attachment, pytest.raises(ValueError, match="attached without a cache"):
        attachment.fill_cache(padded(rows))


LONGEST = 8
ROTARY = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": LONGEST,
        "short_factor": [1.0] * 2,
        "long_factor": [8.0] * 2,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rows_whose_rotary_embedding_follows_their_company_run_uncached(kind: str, tmp_path: Path) -> None:
    """A short row is met beside a long one, by which its hidden states change, then with short ones only."""
    longest = LONGEST if kind == "dynamic" else 4 * LONGEST
    make = functools.partial(toy_llama, rope_parameters=ROTARY[kind], max_position_embeddings=longest)
    epochs = ([[0, 5], [1, 2]], [[0, 1], [2, 5]], [[0, 2], [1, 5]])
    expected_model, model = with_lora(make()), with_lora(make())
    with attach(expected_model):
        expected = train(expected_model, padded, epochs)
    with attach(model, base=CachedBase(folder=tmp_path)), base_passes(model) as passes:
        with pytest.warns(UserWarning, match="batches with positions beyond 8 run uncached") as caught:
            losses = train(model, padded, epochs)
        before = len(passes)
        train(model, padded, [[[0, 1], [2]]])
    assert losses == pytest.approx(expected, rel=1e-5)
    assert sum("run uncached" in str(warning.message) for warning in caught) == 1
    assert len(passes) == before + 1  # the short ones are found; 2 has all 8, and a dynamic one may not have gone back
