"""Run the matrices, two cases at a time, each in a process of its own, and write docs/compatibility.md."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import multiprocessing
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compatibility.check import Outcome

MATRICES = {"tuners": "Adapters", "backbones": "Backbones"}
LIMIT = 300.0  # seconds that a case may take
_CONTEXT = multiprocessing.get_context("forkserver")


def _run_one(matrix: str, name: str, connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(f"compatibility.{matrix}")
    case = next(case for case in module.enumerate_cases() if case.name == name)
    connection.send(module.run(case))


def run_alone(matrix: str, name: str) -> Outcome:
    """One case in its own process; one that crashes or doesn't end is wrong."""
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run_one, args=(matrix, name, send))
    process.start()
    send.close()
    try:
        if not receive.poll(LIMIT):
            return Outcome(name, "wrong", f"it did not end within {LIMIT:.0f} s")
        return receive.recv()  # type: ignore[no-any-return]
    except EOFError:
        process.join()
        return Outcome(name, "wrong", f"its process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def run_matrix(matrix: str, wanted: str) -> list[Outcome]:
    """Every case whose name contains ``wanted``, in the order of enumeration."""
    names = [case.name for case in importlib.import_module(f"compatibility.{matrix}").enumerate_cases()]
    names = [name for name in names if wanted.lower() in name.lower()]
    found: dict[str, Outcome] = {}
    with ThreadPoolExecutor(2) as pool:
        running = {pool.submit(run_alone, matrix, name): name for name in names}
        for future in tqdm(as_completed(running), total=len(names), desc=matrix):
            outcome = found[running[future]] = future.result()
            if outcome.outcome == "wrong":
                tqdm.write(f"WRONG {outcome.name}: {outcome.why}", file=sys.stderr)
    return [found[name] for name in names]


def as_markdown(results: dict[str, list[Outcome]]) -> str:
    """The page, with counts."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Compatibility",
        "",
        f"Made by `make compatibility` on {dt.date.today()} with {versions}, on a CPU.",
        "",
        "**Exact**: turned to its base, the model is an untouched copy of the base, bit for bit (anchor *off*), or to "
        "the rounding with which the adapter's start was subtracted from the base (anchor *initial*), before training "
        "and after a step; KL before the first step, loss, and every gradient of one step equal a dense two-model "
        "reference (relative 2e-5, gradients 2e-4, float32); no training or requires_grad flag is changed, also after "
        "an exception. **Refused**: `attach` raises the sentence that is shown. **Not built**: PEFT or transformers "
        "raise before `attach` is reached, or the case needs what isn't there (a package, a GPU). There is no fourth "
        "outcome: a wrong row fails the command.",
    ]
    for matrix, outcomes in results.items():
        module = importlib.import_module(f"compatibility.{matrix}")
        counts = Counter(outcome.outcome for outcome in outcomes)
        shown = ", ".join(f"{counts[kind]} {kind}" for kind in ("exact", "refused", "not built", "wrong"))
        lines += ["", f"## {MATRICES[matrix]}", "", f"{len(outcomes)} cases: {shown}. {module.summary(outcomes)}", ""]
        lines += ["| case | outcome | anchor | KL before training (nats) | why |", "|---|---|---|---|---|"]
        for outcome in outcomes:
            kl = "" if outcome.step0_kl is None else f"{outcome.step0_kl:.1e}"
            why = " ".join(outcome.why.replace("|", "\\|").split())
            lines.append(f"| {outcome.name} | {outcome.outcome} | {outcome.anchor} | {kl} | {why} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """1 if any case is wrong."""
    parser = argparse.ArgumentParser(prog="python -m compatibility", description=__doc__)
    parser.add_argument("--matrix", choices=list(MATRICES), nargs="+", default=list(MATRICES))
    parser.add_argument("--case", default="", help="only cases whose name contains this; prints instead of writing")
    parser.add_argument("--output", type=Path, default=Path("docs/compatibility.md"))
    args = parser.parse_args(argv)
    _CONTEXT.set_forkserver_preload([f"compatibility.{matrix}" for matrix in args.matrix])
    results = {matrix: run_matrix(matrix, args.case) for matrix in args.matrix}
    text = as_markdown(results)
    if args.case:
        print(text)
    else:
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
        print(f"Written to {args.output}.")
    return int(any(outcome.outcome == "wrong" for outcomes in results.values() for outcome in outcomes))


if __name__ == "__main__":
    # By the module's own name: the processes that run the cases can't import from a package's __main__ by that name.
    raise SystemExit(importlib.import_module("compatibility.__main__").main())
