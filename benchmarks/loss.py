"""Time and peak extra memory of the loss, forward and backward: ours, the dense definition, and what else there is.

    python -m benchmarks.loss                           # SmolLM2's head, 2,048 tokens, float32: minutes on two cores
    python -m benchmarks.loss --shape gemma3 --tokens 1024
    python -m benchmarks.loss --device cuda             # Llama 3 8B's head, bfloat16, 1,024 to 32,768 tokens

First each form runs in a process of its own, where its peak memory above what was held and its error against float64
are measured. Then all that ran are timed in one process, in turns: the ratio of two medians is a ratio within one run.
A form that isn't installed, fails, or takes longer than the limit is listed as "not run", with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import PeakMemory, append_rows, context, reason_of, run_alone, time_limit
from mask_the_target import TMKL, linear_target_masked_kl, target_masked_kl

# Hidden size and vocabulary of heads that people train.
SHAPES = {
    "toy": (32, 500),
    "smollm2": (576, 49152),
    "qwen": (896, 151936),
    "gemma3": (640, 262144),
    "llama8b": (4096, 128256),
}

# What a form computes; forms that compute different things are no replacement for each other.
Quantity = Literal["products", "CE + TMKL", "CE + full KL", "CE", "full KL"]

_ERROR_ROWS = 64
_COMPILE_SECONDS = 300


class Inputs(NamedTuple):
    """Final hidden states ``[N, d]`` of both models, one head ``[V, d]`` (frozen), and labels ``[N]``."""

    hidden: Tensor
    base_hidden: Tensor
    weight: Tensor
    labels: Tensor


def make_inputs(tokens: int, d: int, vocabulary: int, dtype: torch.dtype, device: str) -> Inputs:
    """Logits with a standard deviation of 3, a target's probability from 0 to nearly 1, a base 0.3 nats away."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(vocabulary, d).mul_(3 / d**0.5)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    pull = 6 * torch.rand(tokens, 1, generator=generator, device=device)  # how sure the model is of the target
    hidden = normal(tokens, d) + pull * F.normalize(weight[labels], dim=1)
    base_hidden = hidden + 0.1 * normal(tokens, d)
    return Inputs(hidden.to(dtype).requires_grad_(), base_hidden.to(dtype), weight.to(dtype), labels)


# --------------------------------------------------------------------------------------------------------------- forms


def floor(inputs: Inputs) -> None:
    """The three products that any of them needs, in the inputs' own dtype, and nothing else."""
    hidden, base_hidden, weight, _ = (tensor.detach() for tensor in inputs)
    rows = min(1024, len(hidden))
    logits, base_logits = (hidden.new_empty(rows, len(weight)) for _ in range(2))
    d_hidden = torch.empty_like(hidden)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        count = len(hidden[chunk])
        torch.mm(hidden[chunk], weight.t(), out=logits[:count])
        torch.mm(base_hidden[chunk], weight.t(), out=base_logits[:count])
        torch.mm(logits[:count], weight, out=d_hidden[chunk])


def dense(inputs: Inputs) -> Tensor:
    """The definition: both models' logits for every token."""
    hidden, base_hidden, weight, labels = inputs
    with torch.no_grad():
        base_logits = base_hidden @ weight.t()
    return target_masked_kl(hidden @ weight.t(), base_logits, labels).loss


def _plain(logits: Tensor, base_logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of CE + TMKL, in four plain lines of float32."""
    y = labels[:, None]
    log_q_a = logits.float().scatter(1, y, -1e30).log_softmax(1)  # finite, so that 0 * difference is 0
    log_q_b = base_logits.float().scatter(1, y, -1e30).log_softmax(1)
    kl = F.kl_div(log_q_a, log_q_b, reduction="sum", log_target=True)
    return F.cross_entropy(logits.float(), labels, reduction="sum") + kl


@cache
def _compiled_dense() -> Callable[..., Tensor]:
    def whole(hidden: Tensor, base_hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            base_logits = base_hidden @ weight.t()
        return _plain(hidden @ weight.t(), base_logits, labels) / len(labels)

    return torch.compile(whole, dynamic=False)


def dense_compiled(inputs: Inputs) -> Tensor:
    """Full logits of both models under torch.compile, written without anything that breaks its graph."""
    return _compiled_dense()(*inputs)


def linear(inputs: Inputs) -> Tensor:
    """Ours."""
    return linear_target_masked_kl(*inputs).loss


def linear_bf16_logits(inputs: Inputs) -> Tensor:
    """Ours, with logits rounded to bfloat16."""
    return linear_target_masked_kl(*inputs, logits_dtype=torch.bfloat16).loss


def linear_full_kl(inputs: Inputs) -> Tensor:
    """Ours, with the target kept: what a distillation loss computes."""
    return linear_target_masked_kl(*inputs, TMKL(mask_target=False)).loss


def linear_ce(inputs: Inputs) -> Tensor:
    """Ours at weight 0."""
    return linear_target_masked_kl(*inputs, TMKL(weight=0.0)).loss


def liger(inputs: Inputs) -> Tensor:
    """Liger's chunked distillation, compiled: CE + forward KL, one frozen head for both."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, base_hidden, weight, labels = inputs
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=True)
    return loss(hidden, weight, base_hidden, weight, labels)


def liger_triton(inputs: Inputs) -> Tensor:
    """Liger's Triton kernel for the KL alone, which is also what NVIDIA ModelOpt's distillation trainer calls."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    hidden, base_hidden, weight, labels = inputs
    return LigerFusedLinearJSD(jsd_beta=0.0)(hidden, weight, base_hidden, weight, labels)


def trl_chunk(inputs: Inputs) -> Tensor:
    """Checkpointed chunks of 256 tokens with float32 products, as TRL's ``chunked_nll`` was up to 1.14."""
    hidden, base_hidden, weight, labels = inputs

    def chunk(h: Tensor, h_base: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            base_logits = h_base.float() @ w.float().t()
        return _plain(h.float() @ w.float().t(), base_logits, y)

    pieces = zip(hidden.split(256), base_hidden.split(256), labels.split(256), strict=True)
    losses = [checkpoint(chunk, h, h_base, weight, y, use_reentrant=False) for h, h_base, y in pieces]
    return torch.stack(losses).sum() / len(labels)


def trl_fused_ce(inputs: Inputs) -> Tensor:
    """TRL's fused head, as its SFTTrainer calls it: CE alone, one model."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    hidden, _, weight, labels = inputs
    log_probs = _ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
    )[0]
    return -log_probs.mean()


def trl_fused_kl(inputs: Inputs) -> Tensor:
    """TRL's fused head and the fused divergence of its DistillationTrainer: CE + full KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, base_hidden, weight, _ = inputs
    divergence = ChunkedDivergenceFunction.apply(hidden, weight, None, base_hidden, weight, None, 0.0)[0]
    return trl_fused_ce(inputs) + divergence.mean()


@dataclass(frozen=True)
class Form:
    """One way to compute the loss, and what it computes."""

    run: Callable[[Inputs], Tensor | None]
    computes: Quantity
    compiles: bool = False
    only_on: str = ""
    only_in: torch.dtype | None = None


FORMS = {
    form.run.__name__: form
    for form in (
        Form(floor, "products"),
        Form(dense, "CE + TMKL"),
        Form(dense_compiled, "CE + TMKL", compiles=True),
        Form(linear, "CE + TMKL"),
        Form(linear_bf16_logits, "CE + TMKL", only_in=torch.bfloat16),
        Form(linear_full_kl, "CE + full KL"),
        Form(linear_ce, "CE"),
        Form(liger, "CE + full KL", compiles=True),
        Form(liger_triton, "full KL", only_on="cuda"),
        Form(trl_chunk, "CE + TMKL"),
        Form(trl_fused_kl, "CE + full KL"),
        Form(trl_fused_ce, "CE"),
    )
}


def reference(inputs: Inputs, computes: Quantity) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in the hidden states ``[N, d]``, from float64 logits by the dense definition."""
    hidden = inputs.hidden.detach().double().requires_grad_()
    weight = inputs.weight.double()
    base_logits = inputs.base_hidden.double() @ weight.t()
    logits = hidden @ weight.t()
    masked = computes == "CE + TMKL"
    result = target_masked_kl(
        logits, base_logits, inputs.labels, TMKL(mask_target=masked, weight=float(computes != "CE"))
    )
    loss = result.loss - (F.cross_entropy(logits, inputs.labels) if computes == "full KL" else 0)
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


def errors(form: Form, inputs: Inputs) -> tuple[float, float]:
    """Relative error of the loss and of its gradient in the hidden states (norm of the difference over the norm)."""
    inputs = inputs._replace(hidden=inputs.hidden.detach().requires_grad_())
    expected, expected_gradient = reference(inputs, form.computes)
    loss = form.run(inputs)
    assert loss is not None
    loss.backward()
    assert inputs.hidden.grad is not None
    gradient = inputs.hidden.grad.double()
    return (
        float((loss.detach().double() - expected).abs() / expected.abs()),
        float((gradient - expected_gradient).norm() / expected_gradient.norm()),
    )


# --------------------------------------------------------------------------------------------------------- measurement


def call(form: Form, inputs: Inputs) -> None:
    """Forward and backward once."""
    loss = form.run(inputs)
    if loss is not None:
        loss.backward()
    inputs.hidden.grad = None


def measure_alone(name: str, inputs: Inputs, device: str, limit: float) -> dict[str, float]:
    """Extra memory and errors of one form, in a process that ends itself when a call is slower than ``limit`` s."""
    form = FORMS[name]
    with time_limit(limit + _COMPILE_SECONDS * form.compiles):
        call(form, inputs)  # compiles, starts threads, fills the libraries' own caches
        _wait(device)
    with time_limit(limit), PeakMemory(device) as memory:
        call(form, inputs)
    found = {"extra_mib": memory.extra_mib}
    if form.computes != "products":
        few = slice(0, _ERROR_ROWS)
        inputs = Inputs(inputs.hidden[few], inputs.base_hidden[few], inputs.weight, inputs.labels[few])
        found["loss_error"], found["d_hidden_error"] = errors(form, inputs)
    return found


def measure_times(
    names: list[str], inputs: Inputs, device: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each form's calls, all forms in turns, ``rounds`` times; and why a form has none."""
    times: dict[str, list[float]] = {name: [] for name in names}
    reasons: dict[str, str] = {}
    cuda = device.startswith("cuda")
    for number in range(rounds + 1):  # the first round is not counted
        for name in names:
            if name in reasons:
                continue
            try:
                if cuda:  # the form's blocks are allocated anew outside the measured calls
                    torch.cuda.empty_cache()
                    call(FORMS[name], inputs)
                for _ in range(3 if cuda else 1):
                    _wait(device)
                    start = time.perf_counter()
                    call(FORMS[name], inputs)
                    _wait(device)
                    if number:
                        times[name].append(1000 * (time.perf_counter() - start))
            except Exception as error:  # one rival's failure is no reason to lose the others
                reasons[name] = reason_of(error)
                inputs.hidden.grad = None
                gc.collect()
    return {name: values for name, values in times.items() if name not in reasons}, reasons


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run(args: argparse.Namespace, tokens: int) -> list[dict[str, object]]:
    """One table, printed, and its rows."""
    d, vocabulary = SHAPES[args.shape]
    dtype = getattr(torch, args.dtype)
    results: dict[str, dict[str, Any]] = {name: {} for name in args.forms}
    for name in args.forms:
        form = FORMS[name]
        if form.only_on and not args.device.startswith(form.only_on):
            results[name]["not_run"] = f"needs {form.only_on}"
        elif form.only_in not in (None, dtype):
            results[name]["not_run"] = f"needs {form.only_in} inputs"
        else:
            print(f"memory and error of {name} ...", file=sys.stderr)
            arguments = ["--shape", args.shape, "--tokens", str(tokens), "--dtype", args.dtype]
            arguments += ["--device", args.device, "--limit", str(args.limit), "--alone", name]
            # What is freed goes back to the system at once, from 64 KiB on, so that a second call's peak is its own.
            answer, reason = run_alone("benchmarks.loss", arguments, args.limit, MALLOC_MMAP_THRESHOLD_="65536")
            results[name] |= {"not_run": reason} if answer is None else json.loads(answer)
    inputs = make_inputs(tokens, d, vocabulary, dtype, args.device)
    names = [name for name in args.forms if "not_run" not in results[name]]
    times, reasons = measure_times(names, inputs, args.device, args.rounds)
    del inputs
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()  # the next number of tokens' processes need the card
    for name, reason in reasons.items():
        results[name]["not_run"] = reason
    medians = {name: statistics.median(values) for name, values in times.items()}

    common = context(args.device) | {"device": args.device, "dtype": args.dtype, "shape": args.shape}
    common |= {"tokens": tokens, "hidden": d, "vocabulary": vocabulary, "rounds": args.rounds}
    print(f"\n{common['machine']}, torch {common['torch']}, TRL {common['trl'] or '-'}, ", end="")
    print(f"Liger {common['liger_kernel'] or '-'}, commit {common['commit'] or '-'}")
    print(f"{args.shape}: {tokens} tokens x {d} x {vocabulary}, {args.dtype}; errors over {_ERROR_ROWS} rows")
    print(f"{'form':<20}{'computes':<14}{'ms':>10}{'/ linear':>10}{'extra MiB':>11}{'/ dense':>9}", end="")
    print(f"{'loss error':>12}{'d hidden':>10}")
    rows = []
    for name in args.forms:
        found = results[name]
        row = common | {"form": name, "computes": FORMS[name].computes, "not_run": found.get("not_run", "")}
        row |= dict.fromkeys(
            ("ms", "ratio_to_linear", "extra_mib", "memory_to_dense", "loss_error", "d_hidden_error"), ""
        )
        print(f"{name:<20}{FORMS[name].computes:<14}", end="")
        if "not_run" in found:
            print(f"  not run: {found['not_run']}")
            rows.append(row)
            continue
        row["ms"] = f"{medians[name]:.2f}"
        row["extra_mib"] = f"{found['extra_mib']:.1f}"
        if "linear" in medians:
            row["ratio_to_linear"] = f"{medians[name] / medians['linear']:.3f}"
        if results.get("dense", {}).get("extra_mib"):
            row["memory_to_dense"] = f"{found['extra_mib'] / results['dense']['extra_mib']:.4f}"
        for error in ("loss_error", "d_hidden_error"):
            if error in found:
                row[error] = f"{found[error]:.1e}"
        print(f"{row['ms']:>10}{row['ratio_to_linear']:>10}{row['extra_mib']:>11}{row['memory_to_dense']:>9}", end="")
        print(f"{row['loss_error']:>12}{row['d_hidden_error']:>10}", flush=True)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default %(default)s")
    parser.add_argument("--shape", choices=list(SHAPES), help="default smollm2, on cuda llama8b")
    parser.add_argument("--tokens", type=int, nargs="+", help="default 2048, on cuda 1024 4096 8192 32768")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default float32, on cuda bfloat16")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM")
    parser.add_argument("--rounds", type=int, default=3, help="each form's turns; default %(default)s")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a call may take; default %(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("loss.csv"))
    parser.add_argument("--alone", choices=list(FORMS), help=argparse.SUPPRESS)  # one form's memory, in this process
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    args.shape = args.shape or ("llama8b" if cuda else "smollm2")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.tokens = args.tokens or ([1024, 4096, 8192, 32768] if cuda else [2048])
    if args.alone:
        inputs = make_inputs(args.tokens[0], *SHAPES[args.shape], getattr(torch, args.dtype), args.device)
        try:
            print(json.dumps(measure_alone(args.alone, inputs, args.device, args.limit)))
        except Exception as error:
            sys.exit(reason_of(error))
        return
    for tokens in args.tokens:
        append_rows(args.output, run(args, tokens))


if __name__ == "__main__":
    main()
