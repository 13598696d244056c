"""Lightning and Fabric: the same losses and weights as a raw loop, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from conftest import batch, toy_llama, with_lora
from mask_the_target import TMKL, CachedBase, attach
from mask_the_target.attach import attachment_of, unwrap
from mask_the_target.integrations.lightning import TMKLCallback
from reference import reference_loss

OPTIONS = TMKL(weight=0.5, context_weight=0.3)
BATCHES = [batch(rows=3, length=10 + seed, seed=seed) for seed in range(6)]


class Module(lightning.LightningModule):
    """As users write it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, inputs: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**inputs).loss

    def validation_step(self, inputs: dict[str, torch.Tensor], index: int) -> None:
        self.log("val_loss", self.model(**inputs).loss, batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)


def fit(folder: Path, module: Any, callback: Any, *, validate: bool = False, **settings: Any) -> Any:
    settings = {"max_epochs": 1, "enable_checkpointing": False, **settings}
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[callback, *settings.pop("callbacks", [])],
        **settings,
    )
    data = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    trainer.fit(module, data, data if validate else None, ckpt_path=settings.pop("ckpt_path", None))
    return trainer


def raw_loop(model: nn.Module, accumulate: int = 1) -> list[tuple[float, float, float]]:
    """The same training without Lightning."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    found = []
    with attach(model, OPTIONS) as attachment:
        for number, inputs in enumerate(BATCHES, start=1):
            (model(**inputs).loss / accumulate).backward()
            last = attachment.last
            found.append((float(last.ce), float(last.kl), float(last.context_kl)))
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return found


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_is_the_raw_loop_and_the_reference(tmp_path: Path, accumulate: int) -> None:
    base = toy_llama()
    start = with_lora(copy.deepcopy(base), moved=0.2)
    module, callback = Module(copy.deepcopy(start)), TMKLCallback(OPTIONS)
    trainer = fit(tmp_path, module, callback, accumulate_grad_batches=accumulate, validate=True)
    model = copy.deepcopy(start)
    expected = raw_loop(model, accumulate)
    assert all(torch.equal(a, b) for a, b in zip(weights(module.model), weights(model), strict=True))
    trainer.logger.save()
    rows = [line.split(",") for line in (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()]
    logged = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    found = [tuple(float(row[name]) for name in ("ce", "kl", "context_kl")) for row in logged if row["ce"]]
    # At each optimizer step Lightning logs the batch that it ended with.
    assert found == [pytest.approx(values, rel=1e-5) for values in expected[accumulate - 1 :: accumulate]]
    first = reference_loss(start, base, BATCHES[0], OPTIONS)
    assert expected[0] == pytest.approx((float(first.ce), float(first.kl), float(first.context_kl)), rel=1e-5)
    assert expected[0][1] > 0.01
    assert attachment_of(unwrap(module.model)[0]) is None  # detached at the end


def test_a_base_that_is_written_over_is_told_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    told: list[int] = []

    class Overwrites(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            told.append(sum("weights of the base have changed" in str(each.message) for each in seen))
            unwrap(pl_module.model)[0].model.norm.weight.data *= 1.1

    with warnings.catch_warnings(record=True) as seen:
        module = Module(with_lora(toy_llama()))
        fit(tmp_path, module, TMKLCallback(OPTIONS), max_epochs=2, callbacks=[Overwrites()])
    assert told == [0, 1]


def test_the_cached_base_trains_the_same(tmp_path: Path) -> None:
    start = with_lora(toy_llama(), moved=0.2)
    found = []
    for base in ("auto", CachedBase(folder=str(tmp_path / "cache"))):
        module, callback = Module(copy.deepcopy(start)), TMKLCallback(OPTIONS, base=base)
        fit(tmp_path, module, callback, max_epochs=2)
        found.append(weights(module.model))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_evaluation_is_plain_cross_entropy(tmp_path: Path) -> None:
    module = Module(with_lora(toy_llama(), moved=0.2))
    trainer = fit(tmp_path, module, TMKLCallback(OPTIONS), validate=True, limit_train_batches=1)
    module.eval()
    with torch.no_grad():
        plain = torch.stack([module.model(**inputs).loss for inputs in BATCHES]).mean()
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(plain), rel=1e-5)


def test_the_base_is_settled_before_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """PiSSA's base is told by its initial adapter, which a checkpoint replaces: the second fit's first KL shows it."""
    torch.manual_seed(0)
    make = lambda: Module(with_lora(toy_llama(), init_lora_weights="pissa"))  # noqa: E731
    base, saving = toy_llama(), ModelCheckpoint(dirpath=tmp_path, filename="last", save_weights_only=False)
    first = make()
    fit(tmp_path, first, TMKLCallback(OPTIONS), enable_checkpointing=True, callbacks=[saving])
    expected = reference_loss(first.model, base, BATCHES[0], OPTIONS)
    second, callback = make(), TMKLCallback(OPTIONS)
    seen: list[float] = []

    class Look(lightning.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(float(callback.attachment.last.kl))

    trainer = lightning.Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        callbacks=[callback, Look()],
    )
    data = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    trainer.fit(second, data, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)
    assert seen[0] == pytest.approx(float(expected.kl), rel=1e-3)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_what_the_module_unfreezes_in_its_own_setup_is_refused(init: Any, tmp_path: Path) -> None:
    """Which comes after the callback's."""

    class Thaws(Module):
        def setup(self, stage: str) -> None:
            unwrap(self.model)[0].model.norm.weight.requires_grad_(True)

    with pytest.raises(ValueError, match=r"1 weights outside the adapter are trainable \(model\.norm\.weight\)"):
        fit(tmp_path, Thaws(with_lora(toy_llama(), init_lora_weights=init)), TMKLCallback(OPTIONS))


def test_a_model_that_the_module_replaces_in_its_own_setup_is_its_own_base(tmp_path: Path) -> None:
    class Replaces(Module):
        def setup(self, stage: str) -> None:
            self.model = with_lora(toy_llama(), moved=0.2)

    module = Replaces(with_lora(toy_llama(seed=1)))
    fit(tmp_path, module, TMKLCallback(OPTIONS))
    model = with_lora(toy_llama(), moved=0.2)
    raw_loop(model)
    assert all(torch.equal(a, b) for a, b in zip(weights(module.model), weights(model), strict=True))


def test_losses_that_are_not_ours_are_stopped(tmp_path: Path) -> None:
    class FromLogits(Module):
        def training_step(self, inputs: Any, index: int) -> torch.Tensor:
            labels = inputs.pop("labels")
            logits = self.model(**inputs).logits
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    class Other(Module):
        def training_step(self, inputs: Any, index: int) -> torch.Tensor:
            self.model(**inputs)
            return sum(p.square().sum() for p in self.parameters() if p.requires_grad)

    with pytest.raises(RuntimeError, match=r"ran in eval mode.*from_pretrained gives a model in eval mode, and Light"):
        fit(tmp_path, Module(with_lora(toy_llama()).eval()), TMKLCallback())
    with pytest.raises(RuntimeError, match="a training forward came without labels"):
        fit(tmp_path, FromLogits(with_lora(toy_llama())), TMKLCallback())
    module = Other(with_lora(toy_llama(), moved=0.1))
    before = copy.deepcopy(weights(module.model))
    with pytest.raises(RuntimeError, match="backpropagated it 0 times: it trains on another loss"):
        fit(tmp_path, module, TMKLCallback())
    assert all(torch.equal(a, b) for a, b in zip(weights(module.model), before, strict=True))
    assert attachment_of(unwrap(module.model)[0]) is None


def test_modules_without_one_adapted_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Module holds 0 models with an adapter.*__init__ or configure_model"):
        fit(tmp_path, Module(toy_llama()), TMKLCallback())
    two = Module(with_lora(toy_llama()))
    two.other = with_lora(toy_llama())
    with pytest.raises(ValueError, match="holds 2 models with an adapter"):
        fit(tmp_path, two, TMKLCallback())
    with pytest.raises(ValueError, match=r"takes the options as TMKL\(...\), got float"):
        TMKLCallback(0.5)  # type: ignore[arg-type]


def test_a_model_of_configure_model(tmp_path: Path) -> None:
    class Late(Module):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.model, nn.Identity):
                self.model = with_lora(toy_llama(), moved=0.2)

    module = Late()
    fit(tmp_path, module, TMKLCallback(OPTIONS))
    model = with_lora(toy_llama(), moved=0.2)
    raw_loop(model)
    assert all(torch.equal(a, b) for a, b in zip(weights(module.model), weights(model), strict=True))


def test_fabric_is_the_raw_loop() -> None:
    start = with_lora(toy_llama(), moved=0.2)
    model, expected = copy.deepcopy(start), copy.deepcopy(start)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    with attach(model, OPTIONS) as attachment:
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
        wrapped, optimizer = fabric.setup(model, optimizer)
        kls = []
        for inputs in fabric.setup_dataloaders(torch.utils.data.DataLoader(BATCHES, batch_size=None)):
            fabric.backward(wrapped(**inputs).loss)
            optimizer.step()
            optimizer.zero_grad()
            kls.append(float(attachment.last.kl))
    assert kls == [kl for _, kl, _ in raw_loop(expected)]
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(expected), strict=True))


def test_without_lightning_the_extra_is_named() -> None:
    code = "import sys; sys.modules['lightning'] = None; import mask_the_target.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: Lightning's callback needs Lightning (")
    assert "pip install 'mask-the-target[lightning]'" in last
