"""What the benchmarks share: the machine's name, the commit, peak memory, and a CSV that grows."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

from mask_the_target.front import report

MIB = 2**20
ROOT = Path(__file__).resolve().parent.parent


def context(device: str) -> dict[str, object]:
    """First columns of every row: when, where, with which versions and at which commit."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "machine": machine(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl"),
        "liger_kernel": version("liger-kernel"),
        "commit": commit(),
    }


def version(distribution: str) -> str:
    """Its version, or an empty string where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine(device: str) -> str:
    """Name of the card, or of the processor with the threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    found = report.machine()
    return f"{found['cpu']}, {found['threads']} threads"


def commit() -> str:
    """Short hash of the commit, with "+" when tracked files differ from it; empty outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # The results themselves are written between the runs.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/*.csv")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


class PeakMemory:
    """Peak memory within a ``with`` block, in MiB: resident on the CPU (sampled each millisecond), allocated on a GPU.

    Attributes, after the block:
        peak_mib: the peak itself.
        extra_mib: the peak above what was held when the block began.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        self._start = self._peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._thread.join()
            peak = max(self._peak, _resident())
        self.peak_mib = peak / MIB
        self.extra_mib = (peak - self._start) / MIB

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process when the block takes longer: by a signal's default action, which also ends a long product."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_alone(module: str, arguments: Sequence[str], limit: float, **environment: str) -> tuple[str | None, str | None]:
    """Run ``python -m module arguments`` as a process of its own.

    Args:
        limit: what the process gave :func:`time_limit`, for the reason.
        environment: variables that it gets besides this process's.

    Returns:
        The last line that it printed and None, or None and the reason why there is none.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )
    if done.returncode == -signal.SIGALRM:
        return None, f"slower than {limit:g} s"
    if done.returncode == -signal.SIGKILL:
        return None, "killed, most likely for memory"
    if done.returncode:
        return None, (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1][:200]
    return done.stdout.strip().splitlines()[-1], None


def reason_of(error: Exception) -> str:
    """One line that says what went wrong."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def append_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Append to the CSV. A column that it doesn't have yet is added, empty in the rows that are there."""
    before: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            before = list(csv.DictReader(file))
    everything = [*before, *rows]
    columns = list(dict.fromkeys(name for row in everything for name in row))
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(
            file,
            fieldnames=columns,
            restval="",
        )
        writer.writeheader()
        writer.writerows(everything)
    unfinished.replace(path)
