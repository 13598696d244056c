"""The rivals: each formula against an independent computation, and each as `mtt train --method NAME` on a toy Llama."""

from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("trl")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from front.test_train import (  # noqa: F401
    Grab,
    logits,
    make_model,
    make_rows,
    one_thread,
    weights,
    write_config,
    write_rows,
)
from mask_the_target.attach import Totals
from mask_the_target.cli import main
from mask_the_target.front import rival_losses, rivals, train
from mask_the_target.front.options import parse
from mask_the_target.front.study import AT_ITS_END, NOT_SCALED, read_study

STRENGTHS = {
    "ewc": 1000.0,
    "l2": 1.0,
    "olora": 1.0,
    "stable": 1e-4,
    "eaft": 1.0,
    "talr": 1.0,
    "flow": 1.0,
    "asft": 1.0,
    "dft": None,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def _short(folder: Path, model: Path) -> Path:
    return write_config(folder, model, lr_scheduler_type="constant", max_steps=3)


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    return _short(tmp_path, model)


def options(method: str, strength: float | None = None) -> list[str]:
    strength = STRENGTHS.get(method) if strength is None else strength
    return ["--method", method] + ([] if strength is None else ["--rival_weight", str(strength)])


def trained(config: Path, folder: Path, *argv: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    record = train.run(parse([str(config), "--output_dir", str(folder), *argv]))
    return record, weights(folder)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(tensor, other[name], rtol=0, atol=atol) for name, tensor in one.items())


# -------------------------------------------------------------------------------------------------------- formulas


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 4), st.integers(0, 99))
def test_squared_update_is_the_whole_matrixs(rank: int, n_in: int, n_out: int, scaling: float, seed: int) -> None:
    torch.manual_seed(seed)
    a = torch.randn(rank, n_in, dtype=torch.float64, requires_grad=True)
    b = torch.randn(n_out, rank, dtype=torch.float64, requires_grad=True)
    value, dense = rival_losses.squared_update(a, b, scaling), (scaling * b @ a).square().sum()
    torch.testing.assert_close(value, dense)
    torch.testing.assert_close(torch.autograd.grad(value, [a, b]), torch.autograd.grad(dense, [a, b]))
    assert torch.autograd.gradcheck(lambda a, b: rival_losses.squared_update(a, b, scaling), (a, b))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (3, 10)])
def test_top_directions_span_what_svd_finds(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    found = rival_losses.top_directions(weight, 4)
    right = torch.linalg.svd(weight).Vh[: min(4, *shape)]
    torch.testing.assert_close(found @ found.T, torch.eye(len(right), dtype=torch.float64))
    torch.testing.assert_close(found.T @ found, right.T @ right)  # the same subspace, whatever its basis
    deficient = weight[:, :1] @ weight[:1]  # rank 1
    found = rival_losses.top_directions(deficient, 3)
    torch.testing.assert_close(found @ found.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(deficient @ found.T @ found, deficient)


@given(st.integers(2, 40), st.floats(0.3, 3), st.integers(0, 99))
def test_token_weights_are_the_formulas(vocabulary: int, strength: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = 4 * torch.randn(7, vocabulary, dtype=torch.float64)
    labels, sequences = torch.randint(vocabulary, (7,)), torch.tensor([0, 0, 0, 2, 2, 5, 5])
    probabilities = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits.tolist()]
    p = [row[label] for row, label in zip(probabilities, labels.tolist(), strict=True)]
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(rival_losses.dft_weights(ce).tolist(), p)

    expected = []
    for row in probabilities:
        top = sorted(row, reverse=True)[:20]
        top = [value / sum(top) for value in top]
        entropy = -sum(value * math.log(value) for value in top if value > 0)
        expected.append((entropy / math.log(len(top))) ** strength)
    torch.testing.assert_close(rival_losses.eaft_weights(logits, strength).tolist(), expected, atol=1e-9, rtol=1e-6)

    means = sorted(sum(-math.log(p[i]) for i in group) / len(group) for group in ([0, 1, 2], [3, 4], [5, 6]))
    expected = [max(0.01, value ** (1 / (strength * means[1]))) for value in p]
    torch.testing.assert_close(rival_losses.talr_weights(ce, sequences, strength).tolist(), expected)

    losses = [-math.log(value) for value in p]
    tau = strength * sorted(losses)[3]
    assert rival_losses.flow_weights(losses, strength) == pytest.approx([math.exp(-loss / tau) for loss in losses])


def test_full_kl_is_the_sum_and_has_its_gradient() -> None:
    torch.manual_seed(0)
    base, adapted = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    q, p = base.softmax(1), adapted.softmax(1)
    torch.testing.assert_close(rival_losses.full_kl(base, adapted), (q * (q / p).log()).sum(1))
    assert torch.autograd.gradcheck(lambda z: rival_losses.full_kl(base, z), (adapted,))
    nowhere = torch.tensor([[0.0, 1.0, -math.inf]])
    moved = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    rival_losses.full_kl(nowhere, moved).sum().backward()
    assert moved.grad is not None
    torch.testing.assert_close(moved.grad, torch.zeros(1, 3))


def test_no_supervised_token_gives_no_weight() -> None:
    nothing = torch.zeros(0)
    assert rival_losses.talr_weights(nothing, nothing.long()).shape == (0,)
    assert rival_losses.eaft_weights(torch.zeros(0, 30)).shape == (0,)


# ------------------------------------------------------------------------------- on a model, against the plain forward


def built(config: Path, *argv: str) -> tuple[Any, Any]:
    """The trainer of a run before it starts, without a rival in it, and the run's settings."""
    settings = parse([str(config), *argv])
    data, path = train._find_data_and_model(settings)
    return train._build_trainer(settings, data, path, rival_losses.callbacks(settings.tmkl)), settings


def prepared(config: Path, method: str, strength: float | None = None) -> Any:
    """A trainer with the rival in it, its adapter moved as if it had been trained, and one of its batches."""
    trainer, settings = built(config, *options(method, strength))
    rival_losses.install(trainer, settings.tmkl)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(6)]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, batch


def by_token(model: Any, batch: Any) -> list[tuple[int, list[float], int]]:
    """Row, distribution and target of each supervised token, in float64."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    found = []
    for row, labels in enumerate(batch["labels"].tolist()):
        for position, label in enumerate(labels[1:]):
            if label != -100:
                found.append((row, logits[row, position].softmax(0).tolist(), label))
    return found


@pytest.mark.parametrize("method", ["dft", "eaft", "talr", "flow", "asft"])
def test_loss_is_the_sum_over_tokens(config: Path, model: Path, method: str) -> None:
    trainer, batch = prepared(config, method, None if method == "dft" else 0.7)
    tokens = by_token(trainer.model, batch)
    separate = AutoModelForCausalLM.from_pretrained(model)  # the base, loaded on its own
    base = by_token(separate, batch)
    ce = [-math.log(p[y]) for _, p, y in tokens]
    if method == "dft":
        losses = [loss * math.exp(-loss) for loss in ce]
    elif method == "eaft":  # 19 tokens: all of the vocabulary
        entropy = [-sum(value * math.log(value) for value in p) / math.log(len(p)) for _, p, _ in tokens]
        losses = [h**0.7 * loss for h, loss in zip(entropy, ce, strict=True)]
    elif method == "talr":
        means = sorted(
            sum(loss for loss, token in zip(ce, tokens, strict=True) if token[0] == row)
            / sum(token[0] == row for token in tokens)
            for row in range(6)
        )
        tau = 0.7 * (means[2] + means[3]) / 2
        losses = [loss * max(0.01, math.exp(-loss / tau)) for loss in ce]
    elif method == "flow":
        every = []
        for row in trainer.train_dataset:
            one = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
            every.append(float(separate(**one).loss))  # transformers' own mean over the supervised tokens
        tau = 0.7 * torch.tensor(every).quantile(0.5).item()
        losses = [math.exp(-every[row] / tau) * loss for (row, _, _), loss in zip(tokens, ce, strict=True)]
    else:
        kl = [
            sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            for (_, p, _), (_, q, _) in zip(tokens, base, strict=True)
        ]
        losses = [loss * math.exp(-loss) + 0.7 * k for loss, k in zip(ce, kl, strict=True)]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    half = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(2 * len(losses)))
    assert half.item() == pytest.approx(sum(losses) / len(losses) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="not handed out in training"):
        trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert plain_loss(trainer, batch) == pytest.approx(sum(ce) / len(ce))


def plain_loss(trainer: Any, batch: Any) -> float:
    """The mean cross-entropy, which is what the trainer evaluates, whatever it trains on."""
    tokens = by_token(trainer.model, batch)
    mean = sum(-math.log(p[y]) for _, p, y in tokens) / len(tokens)
    trainer.model.eval()
    with torch.no_grad():
        assert float(trainer.compute_loss(trainer.model, dict(batch))) == pytest.approx(mean, rel=1e-4)
    trainer.model.train()
    return mean


def test_ewc_is_the_fisher_weighted_distance_from_the_start(config: Path) -> None:
    trainer, batch = prepared(config, "ewc", 5.0)
    fresh = built(config, "--method", "ce")[0].model.eval()  # the same start, by the same seed
    start = {name: p for name, p in fresh.named_parameters() if p.requires_grad}
    fisher = {name: torch.zeros_like(p) for name, p in start.items()}
    for row in trainer.train_dataset:
        fresh.zero_grad()
        fresh(**{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}).loss.backward()
        for name, p in start.items():
            fisher[name] += p.grad**2 / len(trainer.train_dataset)
    assert sum(f.sum() for name, f in fisher.items() if "lora_A" in name) == 0  # B is 0 at the start
    assert sum(f.sum() for name, f in fisher.items() if "lora_B" in name) > 0
    now = dict(trainer.model.named_parameters())
    penalty = 2.5 * sum(float((fisher[name] * (now[name] - p) ** 2).sum()) for name, p in start.items())
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert penalty > 1e-3
    assert loss.item() == pytest.approx(plain_loss(trainer, batch) + penalty, rel=1e-4)


def test_fishers_leave_everything_as_it_was(config: Path) -> None:
    """At the start, the only dropout is the adapter's, whose A has no Fisher: so B's is that without dropout too."""
    trainer, _ = built(config, "--method", "ewc", "--lora_dropout", "0.5")
    model = trainer.model.train()
    model.base_model.model.lm_head.eval()  # a mode that isn't the whole model's
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number, parameter in enumerate(parameters[1:]):
        parameter.grad = torch.full_like(parameter, float(number))
    modes = [module.training for module in model.modules()]
    values = [parameter.detach().clone() for parameter in model.parameters()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    fisher = rival_losses.diagonal_fisher(trainer, parameters)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [module.training for module in model.modules()] == modes
    assert parameters[0].grad is None
    assert all(bool((p.grad == number).all()) for number, p in enumerate(parameters[1:]))
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    plain, _ = built(config, "--method", "ewc")
    expected = rival_losses.diagonal_fisher(plain, [p for p in plain.model.parameters() if p.requires_grad])
    torch.testing.assert_close(fisher, expected)


def test_l2_is_the_distance_of_the_merged_weights_from_the_base(config: Path, model: Path) -> None:
    trainer, batch = prepared(config, "l2", 0.3)
    loss, ce = trainer.compute_loss(trainer.model, dict(batch)).item(), plain_loss(trainer, batch)
    base = AutoModelForCausalLM.from_pretrained(model).state_dict()
    merged = trainer.model.merge_and_unload().state_dict()
    distance = sum(float((merged[name] - base[name]).double().square().sum()) for name in base)
    assert distance > 1
    assert loss == pytest.approx(ce + 0.15 * distance, rel=1e-4)


def test_olora_is_the_part_of_a_in_the_base_weights_top_directions(config: Path, model: Path) -> None:
    trainer, batch = prepared(config, "olora", 0.3)
    base = AutoModelForCausalLM.from_pretrained(model).state_dict()
    overlap = 0.0
    for name, a in trainer.model.named_parameters():
        if "lora_A" in name:
            path = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
            right = torch.linalg.svd(base[path].double()).Vh[:4]
            overlap += float((a.detach().double() @ right.T).square().sum())
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(plain_loss(trainer, batch) + 0.3 * overlap, rel=1e-4)


def test_layers_that_are_not_plain_lora_are_refused(model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(ValueError, match="no LoRA layer"):
        rival_losses.lora_layers(base)
    dora = get_peft_model(base, LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="q_proj is not a plain LoRA layer"):
        rival_losses.lora_layers(dora)


def test_a_routers_loss_is_refused(config: Path) -> None:
    trainer, settings = built(config, "--method", "dft")
    trainer.aux_loss_enabled = True  # as TRL sets it for mixtures of experts
    with pytest.raises(ValueError, match="don't go with a router's auxiliary loss"):
        rival_losses.install(trainer, settings.tmkl)


# ------------------------------------------------------------------------------------------------ `mtt train --method`


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("ce")
    return trained(_short(folder, model), folder / "out", "--method", "ce")[1]


@pytest.mark.parametrize("method", rivals.RIVALS)
def test_a_run_trains_with_it_and_says_so(
    config: Path, tmp_path: Path, model: Path, method: str, plain_weights: dict[str, torch.Tensor]
) -> None:
    grab = Grab()
    record = train.run(parse([str(config), *options(method)]), [grab])
    assert not same(weights(tmp_path / "out"), plain_weights, atol=1e-4)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), grab.logits, rtol=0, atol=1e-6)  # plain PEFT, nothing of ours
    assert record["method"]["method"] == method
    assert record["method"].get("rival_weight") == STRENGTHS[method]
    assert ("base" in record["method"]) == (method in ("stable", "flow", "asft"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["method"] == record["method"]
    card = (tmp_path / "out" / "README.md").read_text()
    rival = rivals.RIVALS[method]
    assert f"trained with {rival.title}\n" in card
    assert rival.source in card
    if rival.strength is not None:
        assert f"Method: {rival.title} with rival_weight ({rival.strength}) {STRENGTHS[method]}" in card
    assert "cross-entropy" not in card
    logged = [entry for entry in record["log_history"] if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert math.isfinite(entry["ce"])
        if method in rival_losses.PENALTIES:
            assert entry["loss"] == pytest.approx(entry["ce"] + entry["penalty"], abs=1e-4)
    if method in ("ewc", "l2"):
        assert logged[0]["penalty"] == pytest.approx(0, abs=1e-9)  # the start is the base
        assert logged[-1]["penalty"] > 0


def test_dft_is_trls_own(config: Path, tmp_path: Path) -> None:
    _, own = trained(config, tmp_path / "own", "--method", "ce", "--loss_type", "dft")
    _, found = trained(config, tmp_path / "found", "--method", "dft")
    assert same(found, own)


@pytest.mark.parametrize("method", [name for name in rivals.RIVALS if name != "talr"])
def test_eight_rows_one_by_one_are_one_batch_of_eight(config: Path, tmp_path: Path, method: str) -> None:
    """Rows are of different lengths, all of one step's tokens share one denominator, and every other step has four."""
    rows = make_rows(12)
    for number, row in enumerate(rows):
        row["completion"][0]["content"] += " please" * (3 * (number % 3))
    write_rows(tmp_path / "data.jsonl", rows)
    argv = [*options(method), "--per_device_train_batch_size", "8", "--logging_steps", "2", "--max_steps", "4"]
    one, found = trained(config, tmp_path / "one", *argv)
    argv += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"]
    eight, accumulated = trained(config, tmp_path / "eight", *argv)
    assert same(found, accumulated)
    logged = [[entry for entry in record["log_history"] if "loss" in entry] for record in (one, eight)]
    assert len(logged[0]) >= 2
    for one_entry, eight_entry in zip(*logged, strict=True):
        for name in {"loss", "ce", "kl", "penalty", "blocked"} & one_entry.keys():
            assert eight_entry[name] == pytest.approx(one_entry[name], abs=2e-4), name


@pytest.mark.parametrize("method", ["ewc", "olora", "flow", "asft", "stable"])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(config: Path, tmp_path: Path, method: str) -> None:
    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                signal.raise_signal(signal.SIGINT)

    whole, expected = trained(config, tmp_path / "whole", *options(method))
    argv = [str(config), "--output_dir", str(tmp_path / "cut"), *options(method)]
    with pytest.raises(train.Interrupted):
        train.run(parse(argv), [PressCtrlC()])
    with pytest.raises(ValueError, match=r"rival_weight was .* and is now 9\.0"):
        train.run(parse([*argv[:-1], "9", "--resume_from_checkpoint", "last"]))
    cut = train.run(parse([*argv, "--resume_from_checkpoint", "last"]))
    assert same(weights(tmp_path / "cut"), expected, atol=0)
    if method == "ewc":
        assert cut["log_history"][2]["penalty"] == pytest.approx(whole["log_history"][2]["penalty"])


@pytest.mark.parametrize("method", ["asft", "stable"])
def test_pissa_is_held_to_the_true_base(config: Path, tmp_path: Path, method: str) -> None:
    record, _ = trained(config, tmp_path / "out", *options(method, 0.5), "--adapter", "pissa", "--lora_r", "4")
    kl = [entry["kl" if method == "asft" else "full_kl"] for entry in record["log_history"] if "kl" in entry]
    assert kl[0] < 1e-6
    assert kl[1] > 1e-4


def test_stables_gate_blocks_whole_steps(config: Path, tmp_path: Path) -> None:
    _, one = trained(config, tmp_path / "one", "--method", "ce", "--max_steps", "1")
    _, three = trained(config, tmp_path / "three", "--method", "ce")
    record, closed = trained(config, tmp_path / "closed", *options("stable", 1e-9))
    assert same(closed, one)  # the KL is 0 before the first step, and above the threshold ever after
    logged = [entry for entry in record["log_history"] if "blocked" in entry]
    assert [entry["blocked"] for entry in logged] == [0, 1, 1]
    assert logged[0]["full_kl"] < 1e-7
    assert logged[1]["full_kl"] > 1e-3
    record, opened = trained(config, tmp_path / "opened", *options("stable", 1e9))
    assert same(opened, three)
    assert [entry["blocked"] for entry in record["log_history"] if "blocked" in entry] == [0, 0, 0]


def test_the_gate_counts_each_step_alone_and_between_logs(config: Path, tmp_path: Path) -> None:
    """Logged every other step too (and the first), where the KL of a step is a difference of running sums."""
    argv = ["--max_steps", "4", "--learning_rate", "2e-3"]
    opened, _ = trained(config, tmp_path / "opened", *options("stable", 1e9), *argv)
    _, second, third, fourth = (entry["full_kl"] for entry in opened["log_history"] if "full_kl" in entry)
    threshold = (third + 3 * fourth) / 4  # above the mean of the last two, which are logged together
    assert max(second, third) < threshold < fourth
    record, every = trained(config, tmp_path / "every", *options("stable", threshold), *argv)
    assert [entry["blocked"] for entry in record["log_history"] if "blocked" in entry] == [0, 0, 0, 1]
    argv += ["--logging_steps", "2"]
    record, other = trained(config, tmp_path / "other", *options("stable", threshold), *argv)
    assert [entry["blocked"] for entry in record["log_history"] if "blocked" in entry] == [0, 0, 0.5]
    assert same(every, other)


def test_the_gate_reads_a_cached_base(config: Path, tmp_path: Path) -> None:
    argv = [*options("stable", 2e-3), "--max_steps", "6"]  # an epoch is four: the cache is read
    plain, expected = trained(config, tmp_path / "plain", *argv)
    cached, found = trained(
        config, tmp_path / "cached", *argv, "--base", "cached", "--cache_folder", str(tmp_path / "cache")
    )
    assert same(found, expected)
    assert cached["method"] == plain["method"]
    blocked = [[e["blocked"] for e in record["log_history"] if "blocked" in e] for record in (plain, cached)]
    assert blocked[0] == blocked[1]
    assert {0, 1} <= set(blocked[0])


class Stub(SimpleNamespace):
    """What the gate reads of an attached model: the running sums."""

    @property
    def attachment(self) -> Any:
        return self


def test_a_kl_that_is_not_a_number_is_blocked_and_a_step_without_gradients_is_refused() -> None:
    source = Stub(totals=Totals(full_kl=torch.tensor(5.0), supervised=torch.tensor(10.0)))
    gate = rival_losses.KLGate(source, 0.5)  # type: ignore[arg-type]
    model = torch.nn.Linear(2, 1)

    def step(kl: float, tokens: float) -> bool:
        """Whether it is taken."""
        gate.on_step_begin(None, None, None)
        source.totals.full_kl, source.totals.supervised = source.totals.full_kl + kl, source.totals.supervised + tokens
        model(torch.ones(3, 2)).sum().backward()
        gate.on_pre_optimizer_step(None, None, None, model=model)
        return model.weight.grad is not None

    assert step(1.0, 2.0)  # equal to what is allowed
    assert not step(1.1, 2.0)
    assert step(0.0, 0.0)  # nothing supervised
    source.totals = Totals()  # as logging does
    assert step(0.9, 2.0)
    assert not step(math.nan, 2.0)
    assert gate.terms({}) == {"blocked": 2 / 5}
    model.zero_grad()
    gate.on_step_begin(None, None, None)
    source.totals.full_kl = torch.tensor(99.0)
    with pytest.raises(RuntimeError, match="finds no gradient to drop"):
        gate.on_pre_optimizer_step(None, None, None, model=model)


def test_strong_penalties_do_what_they_are_for(config: Path, tmp_path: Path) -> None:
    def penalties(method: str, strength: float) -> list[float]:
        record, _ = trained(config, tmp_path / f"{method}{strength}", *options(method, strength), "--max_steps", "12")
        return [e["penalty"] / strength for e in record["log_history"] if "penalty" in e]

    assert penalties("l2", 100.0)[-1] < 0.5 * penalties("l2", 1e-4)[-1]
    assert penalties("ewc", 1e5)[-1] < 0.5 * penalties("ewc", 1e-4)[-1]
    outside = penalties("olora", 10.0)
    assert outside[-1] < 0.8 * outside[0]


def test_the_penalty_joins_the_loss_before_clipping(config: Path, tmp_path: Path) -> None:
    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            self.norm = float(torch.nn.utils.get_total_norm(grads))

    norm = Norm()
    argv = [str(config), *options("olora", 1000.0), "--max_grad_norm", "0.5", "--max_steps", "1"]
    train.run(parse(argv), [norm])
    assert norm.norm == pytest.approx(0.5, rel=1e-3)


# ------------------------------------------------------------------------------------- what a wrong input is answered


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train", *argv]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_unknown_methods_and_strengths(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The model is not there: nothing is loaded before the answer.
    argv = [str(config), "--model_name_or_path", "./nowhere", "--method"]
    assert "Unknown method 'ecw'. Did you mean 'ewc'? Known: tmkl, ce, ewc," in refused([*argv, "ecw"], capsys)
    assert "Did you mean 'olora'?" in refused([*argv, "O-LoRA"], capsys)
    assert "Did you mean 'tmkl'?" in refused([*argv, "tmk"], capsys)
    assert "Unknown method 'zzz'. Known:" in refused([*argv, "zzz"], capsys)
    path = tmp_path / "bad.yaml"
    path.write_text(config.read_text() + "method: astf\n")
    assert "Did you mean 'asft'?" in refused([str(path)], capsys)
    assert "dft' doesn't take it: it has no strength" in refused([*argv, "dft", "--rival_weight", "1"], capsys)
    assert "tmkl_weight is its strength" in refused([*argv, "tmkl", "--rival_weight", "1"], capsys)
    for bad in ("0", "-1", "nan", "inf"):
        assert "a number above 0" in refused([*argv, "ewc", f"--rival_weight={bad}"], capsys)
    assert parse([str(config), "--method", "stable"]).tmkl.rival_weight is None
    assert rivals.strength_of("stable", None) == 0.1
    assert rivals.strength_of("stable", 0.3) == 0.3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--method ewc --label_smoothing_factor 0.1", "ewc is defined with plain cross-entropy"),
        ("--method asft --loss_type dft", "loss_type is 'dft', and method 'asft' has a loss of its own"),
        ("--method l2 --adapter pissa", "LoRA's update s B A, and pissa's is another"),
        ("--method olora --use_dora true", "and dora's is another"),
        ("--method l2 --lora_modules_to_save lm_head", "lora_modules_to_save trains weights in another way"),
        ("--method olora --load_in_4bit true", "must not be quantised"),
        ("--method asft --base cached", "Leave base at auto"),
        ("--method dft --use_liger_kernel true", "Remove use_liger_kernel"),
        ("--method ewc --dataset_streaming true", "Remove dataset_streaming"),
        ("--method flow --packing true", "Remove packing"),
        ("--method talr --packing true", "talr compares whole sequences"),
        ("--method flow --padding_free true", "flow compares whole sequences"),
        ("--method stable --fp16 true", "Use bf16"),
        ("--method stable --adapter adalora", "AdaLoRA adds its own penalty's and prunes"),
        ("--method stable --optim lomo", "optim is 'lomo', which steps during the backward pass"),
    ],
)
def test_impossible_combinations(config: Path, capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert message in refused([str(config), *argv.split()], capsys)


def test_plain_methods_record_what_they_did(config: Path, tmp_path: Path) -> None:
    record, _ = trained(config, tmp_path / "tmkl", "--max_steps", "1", "--tmkl_weight", "1")
    assert "rival_weight" not in record["method"]
    assert record["method"]["tmkl_weight"] == 1.0
    record, _ = trained(config, tmp_path / "ce", "--max_steps", "1", "--method", "ce")
    assert record["method"] == {"method": "ce"}


def test_a_study_sweeps_a_rivals_strength(config: Path, tmp_path: Path, model: Path) -> None:
    def study(**method: Any) -> Path:
        content = {
            "name": "rivals",
            "model": str(model),
            "recipes": ["arpabet"],
            "probes": ["target", "text:python_docs"],
            "methods": {"ce": {"method": "ce"}, "held": method},
            "train": {"max_steps": 4, "bf16": False},
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    for method, rival in rivals.RIVALS.items():
        grid = {} if rival.strength is None else {"grid": {"rival_weight": [0.1, 1]}}
        trials = read_study(study(method=method, **grid)).parts()["rivals/arpabet/held"]
        assert [trial.options["method"] for trial in trials] == [method] * (3 if rival.strength is None else 6)
        assert {trial.setting.get("rival_weight") for trial in trials} == ({0.1, 1} if grid else {None})
    for bad, message in (
        ({"method": "ecw"}, "methods.held: Unknown method 'ecw'. Did you mean 'ewc'?"),
        ({"method": "ewc", "grid": {"rival_wieght": [1]}}, "Did you mean 'rival_weight'?"),
        ({"method": "dft", "grid": {"rival_weight": [1]}}, "methods.held: rival_weight is 1, and method 'dft' doesn't"),
        ({"method": "l2", "adapter": "vera"}, "methods.held: method 'l2' is defined by LoRA's update"),
    ):
        with pytest.raises(ValueError, match=r"study\.yaml: ") as error:
            read_study(study(**bad))
        assert message in str(error.value)
    for changes, checkpoints, scales, note in (
        ({"method": "ewc", "adapter": "vera"}, [0.25, 0.5, 1.0], [], NOT_SCALED),
        ({"method": "ewc", "adapter": "pissa"}, [1.0], [0.5, 0.75], AT_ITS_END),
        ({"method": "ce", "adapter": "dora"}, [0.25, 0.5, 1.0], [], NOT_SCALED),
        ({"method": "ce", "use_dora": True}, [0.25, 0.5, 1.0], [], NOT_SCALED),
        ({"method": "ce", "lora_modules_to_save": ["lm_head"]}, [0.25, 0.5, 1.0], [], NOT_SCALED),
    ):
        (trial, *_) = read_study(study(**changes)).parts()["rivals/arpabet/held"]
        assert (trial.checkpoints, trial.scales, trial.notes) == (checkpoints, scales, [note])
