"""The benchmarks work: each rival computes what its row says, and each run leaves whole rows."""

import csv
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks import loss, measure, scaling, step

from mask_the_target import target_masked_kl

ROOT = Path(__file__).resolve().parent.parent
# Where each form's package is another than ours.
PACKAGES = {"liger": "liger_kernel", "liger_triton": "liger_kernel", "trl_fused_ce": "trl", "trl_fused_kl": "trl"}
ON_CPU = [name for name, form in loss.FORMS.items() if not form.only_on and form.computes != "products"]


def tiny(dtype: torch.dtype = torch.float32, tokens: int = 300) -> loss.Inputs:
    return loss.make_inputs(tokens, *loss.SHAPES["toy"], dtype, "cpu")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ON_CPU)
def test_each_form_computes_what_its_row_says(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    form = loss.FORMS[name]
    inputs = tiny(form.only_in or torch.float32)
    with torch.compiler.set_stance("force_eager"):  # the formula; each benchmark checks the compiled code itself
        loss_error, gradient_error = loss.errors(form, inputs)
    # 300 rows are several chunks of trl_chunk. bfloat16 logits of up to 18 are rounded by up to 0.03.
    assert loss_error < (2e-2 if form.only_in else 1e-5)
    assert gradient_error < (2e-2 if form.only_in else 1e-5)


def test_the_quantities_differ_and_are_the_definitions() -> None:
    inputs = tiny()
    logits = inputs.hidden.detach().double() @ inputs.weight.double().t()
    base = (inputs.base_hidden.double() @ inputs.weight.double().t()).softmax(1)
    p, labels = logits.softmax(1), inputs.labels[:, None]
    ce = F.cross_entropy(logits, inputs.labels)
    full = (base * (base / p).log()).sum(1).mean()
    rest_b, rest_a = base.scatter(1, labels, 0), p.scatter(1, labels, 0)
    rest_b, rest_a = rest_b / rest_b.sum(1, keepdim=True), rest_a / rest_a.sum(1, keepdim=True)
    masked = torch.special.xlogy(rest_b, rest_b).sum(1).mean() - torch.special.xlogy(rest_b, rest_a).sum(1).mean()
    expected = {"CE": ce, "full KL": full, "CE + full KL": ce + full, "CE + TMKL": ce + masked}
    for computes, value in expected.items():
        assert float(loss.reference(inputs, computes)[0]) == pytest.approx(float(value), rel=1e-9)
    assert len({round(float(value), 4) for value in expected.values()}) == 4


def test_inputs_are_like_a_models() -> None:
    inputs = loss.make_inputs(256, 576, 4096, torch.float32, "cpu")
    hidden = inputs.hidden.detach()
    logits, base_logits = hidden @ inputs.weight.t(), inputs.base_hidden @ inputs.weight.t()
    target = logits.softmax(1).gather(1, inputs.labels[:, None])
    assert 2.5 < float(logits.std()) < 3.5
    assert 0.2 < float((logits - base_logits).std()) < 0.4
    assert float(target.min()) < 0.01
    assert float(target.max()) > 0.9
    assert 0.001 < float(target_masked_kl(logits, base_logits, inputs.labels).kl) < 0.5


def test_one_form_that_fails_leaves_the_others_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: loss.Inputs) -> torch.Tensor:
        raise RuntimeError("out of luck\nand of memory")

    monkeypatch.setitem(loss.FORMS, "broken", loss.Form(broken, "CE"))
    times, reasons = loss.measure_times(["floor", "broken", "linear"], tiny(), "cpu", rounds=2)
    assert {name: len(values) for name, values in times.items()} == {"floor": 2, "linear": 2}
    assert all(value > 0 for values in times.values() for value in values)
    assert reasons == {"broken": "RuntimeError: out of luck"}


def test_loss_prints_a_table_and_appends_whole_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loss.csv"
    arguments = [
        "--shape",
        "toy",
        "--tokens",
        "64",
        "--rounds",
        "1",
        "--forms",
        "dense",
        "linear",
        "linear_bf16_logits",
    ]
    loss.main([*arguments, "--output", str(path)])
    dense, linear, rounded = read(path)
    measured = {"ms", "ratio_to_linear", "extra_mib", "memory_to_dense", "loss_error", "d_hidden_error"}
    always = {
        "date",
        "machine",
        "torch",
        "device",
        "dtype",
        "shape",
        "tokens",
        "hidden",
        "vocabulary",
        "form",
        "computes",
    }
    for row in (dense, linear):
        assert all(row[name] for name in measured | always)
        assert row["not_run"] == ""
        assert float(row["loss_error"]) < 1e-5
    assert float(linear["ratio_to_linear"]) == float(dense["memory_to_dense"]) == 1
    assert rounded["not_run"] == "needs torch.bfloat16 inputs"
    assert not any(rounded[name] for name in measured)
    printed = capsys.readouterr().out
    assert "not run: needs torch.bfloat16 inputs" in printed
    assert printed.count("CE + TMKL") == 3


def test_a_slow_form_is_ended_and_said_so() -> None:
    arguments = ["--shape", "toy", "--tokens", "20000", "--limit", "0.02", "--alone", "dense"]
    assert measure.run_alone("benchmarks.loss", arguments, 0.02) == (None, "slower than 0.02 s")


def test_a_failing_process_gives_its_reason() -> None:
    arguments = ["--shape", "toy", "--tokens", "8", "--alone", "linear_bf16_logits"]  # float32 inputs
    answer, reason = measure.run_alone("benchmarks.loss", arguments, 60)
    assert answer is None
    assert reason is not None
    assert reason.startswith("ValueError: logits_dtype=torch.bfloat16")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_peak_memory_sees_what_is_freed_again() -> None:
    with measure.PeakMemory("cpu") as memory:
        # From the system itself: what earlier tests freed may still be resident, and the allocator would give that.
        block = mmap.mmap(-1, 64 * measure.MIB)
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)  # touched, or it would not be resident
        time.sleep(0.1)  # a hundred samples
        block.close()
    assert 60 < memory.extra_mib < 90
    assert memory.peak_mib > memory.extra_mib


def test_rows_are_appended_also_when_columns_are_new(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    measure.append_rows(path, [{"form": "dense", "ms": 1}])
    measure.append_rows(path, [{"form": "a, b", "mib": 2.5}])
    assert read(path) == [{"form": "dense", "ms": "1", "mib": ""}, {"form": "a, b", "ms": "", "mib": "2.5"}]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]


def step_arguments(arm: str) -> Any:
    return SimpleNamespace(
        alone=arm, layers=2, dtype="float32", device="cpu", length=[12], prompt=4, batch=2, steps=4, checkpointing=False
    )


def test_naive_and_ours_train_on_the_same_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("MTT_CACHE", str(tmp_path / "cache"))
    losses = {}
    for arm in step.ARMS + step.CONTEXT_ARMS:
        torch.manual_seed(0)
        trainer = step.make_trainer(step_arguments(arm), str(tmp_path / arm), [])
        trainer.args.learning_rate = 0.1  # far enough from the base that the KL is seen
        losses[arm] = trainer.train().training_loss
    assert losses["naive"] == pytest.approx(losses["tmkl"], rel=1e-5)
    assert losses["tmkl_cached"] == pytest.approx(losses["tmkl"], rel=1e-5)
    distances = [losses["context"] - losses["tmkl"], losses["anchors"] - losses["context"]]
    for distance in [losses["tmkl"] - losses["ce"], *distances]:
        assert abs(distance) > 1e-3 * losses["ce"]


def test_step_appends_whole_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    path = tmp_path / "step.csv"
    arguments = ["--layers", "1", "--length", "8", "--batch", "2", "--steps", "3", "--rounds", "1", "--arms", "ce"]
    step.main([*arguments, "--output", str(path)])
    (row,) = read(path)
    assert row.pop("not_run") == ""
    row.pop("commit"), row.pop("liger_kernel")  # empty outside a repository, or where it isn't installed
    assert all(row.values())
    assert float(row["ratio_to_ce"]) == float(row["peak_to_ce"]) == 1
    tokens, milliseconds = float(row["tokens_per_s"]), float(row["ms"])  # rounded to a whole one, and to a tenth
    assert tokens == pytest.approx(1000 * 2 * 8 / milliseconds, abs=0.51 + 0.051 * tokens / milliseconds)
    assert float(row["peak_mib"]) > float(row["extra_mib"])
    assert "toy, 1 layers: 2 x 8 tokens a step" in capsys.readouterr().out


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--steps", "2"])
    assert "the first 2 steps are not counted" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        step.main(["--prompt", "255"])
    assert "--prompt 255 leaves no target in a document of --length 256" in capsys.readouterr().err


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", scaling.METHODS)
def test_a_step_has_the_operations_that_the_formula_says(method: str, checkpointing: bool) -> None:
    for supervised in (252, 64):  # all, and a quarter, of 4 sequences of 64
        sizes: Any = (method, 4, 64, supervised)
        counted = scaling.counted_operations(*sizes, checkpointing=checkpointing)
        assert counted == scaling.operations(scaling.TOY, *sizes, checkpointing=checkpointing)


@pytest.mark.parametrize("method", scaling.METHODS[1:])
def test_context_costs_the_heads_products_on_its_rows_alone(method: str) -> None:
    counted = scaling.counted_operations(method, 4, 64, 64, checkpointing=False, context_weight=1.0)
    assert counted == scaling.operations(scaling.TOY, method, 4, 64, 4 * 63)  # whatever has a token after it


def test_a_rank_receives_the_bytes_that_the_formula_says() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "benchmarks.scaling", "--count-received"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = [float(line.split()[-1]) for line in done.stdout.splitlines() if "bytes received" in line]
    assert ratios == [pytest.approx(1, abs=0.002)] * len(scaling.SHARDED)  # norms, and padding to equal shards


def test_a_models_weights_are_counted() -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    for name, shape in {"toy": scaling.TOY, **scaling.SHAPES}.items():
        if name == "toy":
            model = scaling.toy()
        else:
            config = AutoConfig.for_model(
                "llama",
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                vocab_size=shape.vocabulary,
                tie_word_embeddings=shape.tied,
            )
            with torch.device("meta"):
                model = LlamaForCausalLM(config)
        norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
        trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        assert sum(p.numel() for p in model.parameters()) - norms - trained == shape.parameters
        assert trained == (shape.trained if name == "toy" else 0)
