"""Time and peak extra memory of the loss, forward and backward: fused against dense, and against TRL's cross-entropy.

    python benchmarks/loss.py                                  # SmolLM2's head: 2048 tokens, d 576, V 49152
    python benchmarks/loss.py --tokens 8192 --hidden 4096 --vocabulary 128256 --dtype bfloat16 --device cuda

Each form runs in a process of its own, so that one's memory is not another's. Extra memory is the peak during the call
above what was held before it: resident memory on the CPU, allocated memory on a GPU. Rows are appended to a CSV with
the machine and the versions; compare rows of one run only.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from mask_the_target import TMKL, linear_target_masked_kl, target_masked_kl

MIB = 2**20


def dense(hidden: Tensor, base_hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The definition: both models' logits for every token."""
    with torch.no_grad():
        base_logits = base_hidden @ weight.t()
    return target_masked_kl(hidden @ weight.t(), base_logits, labels).loss


def linear(hidden: Tensor, base_hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours."""
    return linear_target_masked_kl(hidden, base_hidden, weight, labels).loss


def linear_full_kl(hidden: Tensor, base_hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours, with the target kept: what a fused distillation loss computes."""
    return linear_target_masked_kl(hidden, base_hidden, weight, labels, TMKL(mask_target=False)).loss


def trl_cross_entropy(hidden: Tensor, base_hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's fused head: cross-entropy alone, one model, so a lower bound and no rival."""
    from trl.trainer.utils import _ChunkedLogProbFunction

    log_probs = _ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("log_probs",))[0]
    return -log_probs.mean()


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    form.__name__: form for form in (dense, linear, linear_full_kl, trl_cross_entropy)
}


class _PeakResident:
    """Peak resident memory above the start, in MiB, sampled each millisecond beside the call."""

    def __enter__(self) -> _PeakResident:
        self._page = resource.getpagesize()
        self._start = self._peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.mib = (max(self._peak, self._now()) - self._start) / MIB

    def _now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * self._page

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, self._now())


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds over the runs, and the peak extra MiB of the first call."""
    torch.manual_seed(0)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden = torch.randn(args.tokens, args.hidden, **options).requires_grad_()
    base_hidden = hidden.detach() + 0.1 * torch.randn(args.tokens, args.hidden, **options)
    weight = torch.randn(args.vocabulary, args.hidden, **options) / args.hidden**0.5
    labels = torch.randint(0, args.vocabulary, (args.tokens,), device=args.device)
    form = FORMS[args.form]

    def call() -> None:
        form(hidden, base_hidden, weight, labels).backward()
        hidden.grad = None

    cuda = args.device.startswith("cuda")
    if cuda:
        call()  # kernels are compiled and loaded
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        mib = (torch.cuda.max_memory_allocated() - before) / MIB
    else:
        warm = torch.randn(64, args.hidden, dtype=options["dtype"])
        (warm @ warm.t()).sum()  # the thread pool and the library's own buffers
        with _PeakResident() as peak:
            call()
        mib = peak.mib
    seconds = []
    for _ in range(args.runs):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"ms": 1000 * statistics.median(seconds), "mib": mib}


def machine(device: str) -> str:
    """Name of the card, or of the processor with its cores in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("loss.csv"))
    parser.add_argument("--form", choices=list(FORMS), help=argparse.SUPPRESS)  # one form, in this process
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args)))
        return
    common = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "machine": machine(args.device),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "hidden": args.hidden,
        "vocabulary": args.vocabulary,
    }
    print(
        f"{common['machine']}, torch {common['torch']}, {args.dtype}, {args.tokens} x {args.hidden} x {args.vocabulary}"
    )
    print(f"{'form':<20}{'ms':>10}{'extra MiB':>12}{'time / first':>14}{'memory / first':>16}")
    rows: list[dict[str, object]] = []
    first: dict[str, float] | None = None
    for form in args.forms:
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{form:<20}failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        first = first or result
        times, memory = result["ms"] / first["ms"], result["mib"] / first["mib"]
        print(f"{form:<20}{result['ms']:>10.1f}{result['mib']:>12.1f}{times:>13.2f}x{memory:>15.2f}x", flush=True)
        rows.append({**common, "form": form, "ms": round(result["ms"], 1), "extra_mib": round(result["mib"], 1)})
    if rows:
        new = not args.output.exists()
        with args.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
