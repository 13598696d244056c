"""What a model has learned and what it has kept, as one table of numbers.

Results are plain dicts that JSON can hold: {probe: {metric: value}}. Each probe also lists its "samples", one value per
row, window or question, so that any two results of the same probes, sizes and precision can be compared in pairs. Where
questions are answered, "answers" shows a few: [{"question", "right", "answer"}, ...], of the same questions in each.
"""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from mask_the_target.base import adapters_off
from mask_the_target.front import harness
from mask_the_target.front import probes as measure
from mask_the_target.front.facts import FORMS, facts
from mask_the_target.front.instructions import follow_instructions
from mask_the_target.front.probes import evenly
from mask_the_target.front.recipes import RECIPES, Row, find_recipe, recipe_rows

PROBES = (
    *("target", "text", *(f"text:{source}" for source in measure.TEXT_SOURCES)),
    *("facts", *(f"facts:{form}" for form in FORMS[1:]), "instructions", "drift"),
)
# Samples that are sums over a row's tokens: the standard error that they give, and the count that divides their total.
PER_TOKEN = {"nats": ("stderr", "tokens"), "edits": ("token_error_rate_stderr", "answer_tokens")}
SHOWN = 5  # answers to look at
Result = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ProbeSizes:
    """How much to measure. Smaller sizes are even subsets of the larger."""

    target_rows: int  # held-out rows for the loss
    answer_rows: int  # held-out rows that are also answered
    text_windows: int  # of 256 tokens, from each source
    facts_per_kind: int
    instructions_per_kind: int
    drift_rows: int
    documents: int  # of each task of lm-evaluation-harness

    @classmethod
    def full(cls) -> ProbeSizes:
        """For a result to report: every fact, 30,600 tokens of text."""
        return cls(
            target_rows=500,
            answer_rows=250,
            text_windows=60,
            facts_per_kind=1000,
            instructions_per_kind=20,
            drift_rows=200,
            documents=250,
        )

    @classmethod
    def quick(cls) -> ProbeSizes:
        """For the demo and for a look during training: about a third of `full`."""
        return cls(
            target_rows=200,
            answer_rows=100,
            text_windows=30,
            facts_per_kind=60,
            instructions_per_kind=8,
            drift_rows=60,
            documents=80,
        )


# By name, as `mtt demo --probes` and a study's sizes take them; tiny is for trying a file.
SIZES = {
    "quick": ProbeSizes.quick(),
    "full": ProbeSizes.full(),
    "tiny": ProbeSizes(
        target_rows=4,
        answer_rows=4,
        text_windows=3,
        facts_per_kind=1,
        instructions_per_kind=1,
        drift_rows=4,
        documents=4,
    ),
}


def probe_sizes(sizes: str | Mapping[str, int]) -> ProbeSizes:
    """Those of a study: a name out of SIZES, or every field of `ProbeSizes`; ValueError names a field that is wrong."""
    if isinstance(sizes, str):
        return SIZES[sizes]
    names = [each.name for each in fields(ProbeSizes)]
    if set(sizes) != set(names):
        wrong = sorted(set(sizes) ^ set(names))[0]
        what = "unknown" if wrong in sizes else "missing"
        raise ValueError(f"{wrong!r} is {what}; give all of these and no others: {', '.join(names)}.")
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a whole number, at least 1.")
    return ProbeSizes(**sizes)


def check_probes(probes: Iterable[str]) -> list[str]:
    """The probes with "text" spelled out as its sources and a tag of lm-evaluation-harness as its tasks, none twice.

    Beside those of PROBES there are "lm_eval:TASK" and "lm_eval:FILE.yaml", see `harness`. The first of them reads what
    the harness has, which takes ten seconds.
    Raises ValueError that names the nearest ones or lists the known ones, and what `harness.check_task` raises.
    """
    known = f"Known: {', '.join(PROBES)}, {harness.PREFIX}TASK."
    chosen: list[str] = []
    for probe in probes:
        if probe.startswith(harness.PREFIX):
            chosen += [harness.PREFIX + task for task in harness.check_task(probe.removeprefix(harness.PREFIX))]
        elif probe == "text":
            chosen += [f"text:{source}" for source in measure.TEXT_SOURCES]
        elif probe in PROBES:
            chosen.append(probe)
        else:
            close = difflib.get_close_matches(probe, PROBES, n=1)
            raise ValueError(f"unknown probe {probe!r}. " + (f"Did you mean {close[0]!r}? " if close else "") + known)
    if not chosen:
        raise ValueError(f"no probe was asked for. {known}")
    return list(dict.fromkeys(chosen))


def load_tasks(probes: Iterable[str]) -> None:
    """Load the data of those probes that are tasks of lm-evaluation-harness, so that what is missing shows early.

    Raises what `harness.load_task` raises.
    """
    for probe in probes:
        if probe.startswith(harness.PREFIX):
            harness.load_task(probe.removeprefix(harness.PREFIX))


def evaluate_one(
    model: nn.Module,
    tokenizer: Any,
    probes: Iterable[str],
    *,
    target_rows: Sequence[Row] | str | None = None,
    max_new_tokens: int = 64,
    sizes: ProbeSizes | None = None,
    base: Result | None = None,
    base_context: Callable[[], AbstractContextManager[None]] | None = None,
    autocast: torch.dtype | Literal["auto"] | None = "auto",
    progress: bool = False,
) -> Result:
    """Measure one state of a model.

    Args:
        probes: names out of PROBES, or tasks of lm-evaluation-harness, see `check_probes`.
        target_rows: held-out prompt-completion rows, or a recipe's name for its test split; for "target" and "drift".
        max_new_tokens: the longest answer; a recipe brings its own.
        sizes: default `ProbeSizes.full()`.
        base: the base's result with the same probes and sizes, for paired standard errors of (this - base).
        base_context: for "drift", see `probes.drift`.
        autocast: precision of all probes but drift; "auto" takes bfloat16 where the hardware has it.
    Raises:
        ValueError: unknown probe, no target rows where they are needed, no adapter for "drift", or a task of the
            harness that can't be loaded or run.
        ModuleNotFoundError: a probe's data package is missing; the message says how to install it.
    """
    chosen = check_probes(probes)
    sizes = sizes or ProbeSizes.full()
    precision = fast_autocast(model) if autocast == "auto" else autocast
    rows: Sequence[Row] = []
    if {"target", "drift"} & set(chosen):
        rows, max_new_tokens = _target_rows(target_rows, max_new_tokens)

    result: Result = {}
    for probe in chosen:
        if probe == "target":
            result[probe] = _target(model, tokenizer, rows, max_new_tokens, sizes, precision, progress)
        elif probe.split(":")[0] == "facts":
            form = probe.partition(":")[2] or "chat"
            result[probe] = _facts(model, tokenizer, form, sizes, precision, progress)
        elif probe == "instructions":
            result[probe] = _instructions(model, tokenizer, sizes, precision, progress)
        elif probe == "drift":
            moved = measure.drift(
                model, tokenizer, evenly(rows, sizes.drift_rows), base_context=base_context, progress=progress
            )
            result[probe] = {"masked_kl": moved.masked_kl, "full_kl": moved.full_kl, "tokens": moved.tokens}
        elif probe.startswith(harness.PREFIX):
            task = probe.removeprefix(harness.PREFIX)
            result[probe] = harness.run_task(
                model, tokenizer, task, documents=sizes.documents, autocast=precision, progress=progress
            )
        else:
            source = probe.split(":")[1]
            text = measure.text_loss(
                model, tokenizer, source, windows=sizes.text_windows, autocast=precision, progress=progress
            )
            result[probe] = {"loss": text.loss, "tokens": text.tokens, "samples": {"loss": text.windows}}
    if base is not None:
        add_paired_errors(result, base)
    return result


def evaluate_pair(
    model: nn.Module,
    tokenizer: Any,
    *,
    probes: Iterable[str],
    target_rows: Sequence[Row] | str | None = None,
    max_new_tokens: int = 64,
    sizes: ProbeSizes | None = None,
    base_context: Callable[[], AbstractContextManager[None]] | None = None,
    autocast: torch.dtype | Literal["auto"] | None = "auto",
    progress: bool = False,
) -> dict[str, Result]:
    """Base and adapted of one loaded model: {"base": result, "adapted": result with paired standard errors}.

    Within `base_context()` the model must be the base (default: its adapters off). Arguments, errors: `evaluate_one`.
    """
    chosen = check_probes(probes)
    as_base = base_context or (lambda: adapters_off(model))
    common: dict[str, Any] = {
        "target_rows": target_rows,
        "max_new_tokens": max_new_tokens,
        "sizes": sizes,
        "autocast": autocast,
        "progress": progress,
    }
    with as_base():
        of_base = [probe for probe in chosen if probe != "drift"]
        base = evaluate_one(model, tokenizer, of_base, **common) if of_base else {}
    adapted = evaluate_one(model, tokenizer, chosen, base=base, base_context=as_base, **common)
    return {"base": base, "adapted": adapted}


def fast_autocast(model: nn.Module) -> torch.dtype | None:
    """bfloat16 for a float32 model where the hardware multiplies bfloat16 faster, else None."""
    parameter = next(model.parameters())
    return torch.bfloat16 if parameter.dtype == torch.float32 and fast_bfloat16(parameter.device.type) else None


def fast_bfloat16(device: str) -> bool:
    """Whether the hardware of this device type multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for this; where the private one is gone, float32 is right and slower.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device == "cpu" and native()


def paired_stderr(values: Sequence[float], others: Sequence[float]) -> float:
    """Standard error of the mean difference of paired samples; NaN for fewer than two pairs.

    Raises ValueError if the two don't pair up.
    """
    if len(values) != len(others):
        raise ValueError(
            f"{len(values)} samples can't be paired with {len(others)}: measure both with the same probes and sizes."
        )
    if len(values) < 2:
        return math.nan
    return statistics.stdev([a - b for a, b in zip(values, others, strict=True)]) / math.sqrt(len(values))


def add_paired_errors(adapted: Result, base: Result) -> None:
    """Add to each probe that both have the paired standard error of (adapted - base): "stderr" for a loss, else that
    of the metric, as "greedy_stderr".

    What is per token on the target has the error of the summed differences over the number of tokens.
    """
    for probe in adapted.keys() & base.keys():
        samples, others = adapted[probe].get("samples", {}), base[probe].get("samples", {})
        for metric in samples.keys() & others.keys():
            error = paired_stderr(samples[metric], others[metric])
            if metric in PER_TOKEN:
                name, tokens = PER_TOKEN[metric]
                adapted[probe][name] = error * len(samples[metric]) / max(1, adapted[probe][tokens])
            else:
                adapted[probe]["stderr" if metric == "loss" else f"{metric}_stderr"] = error


def _target_rows(rows: Sequence[Row] | str | None, max_new_tokens: int) -> tuple[Sequence[Row], int]:
    if isinstance(rows, str):
        return recipe_rows(rows)["test"], find_recipe(rows).max_new_tokens
    if rows is None:
        raise ValueError(
            "the probes 'target' and 'drift' need held-out target rows: give prompt-completion rows or the name of a "
            f"recipe ({', '.join(RECIPES)}), or leave these probes out."
        )
    return rows, max_new_tokens


def _target(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    max_new_tokens: int,
    sizes: ProbeSizes,
    precision: torch.dtype | None,
    progress: bool,
) -> dict[str, Any]:
    """Loss, and the greedy answers' exact match, token error rate and chrF (see `probes`).

    chrF is one figure of all answers, which no row has a part of, so it has no standard error.
    """
    scored, answered = evenly(rows, sizes.target_rows), evenly(rows, sizes.answer_rows)
    loss = measure.target_loss(model, tokenizer, scored, autocast=precision, progress=progress)
    answers = measure.greedy_answers(
        model,
        tokenizer,
        [row["prompt"] for row in answered],
        max_new_tokens,
        autocast=precision,
        progress=progress,
        label="target answers",
    )
    references = [measure.completion_text(row) for row in answered]
    exact = [int(right) for right in measure.exact_matches(answers, references)]
    edits, answer_tokens = measure.token_edits(answers, references)
    return {
        "loss": loss.loss,
        "exact_match": statistics.fmean(exact),
        "token_error_rate": sum(edits) / max(1, answer_tokens),
        "chrf": measure.chrf(answers, references),
        "n": len(scored),
        "tokens": sum(loss.tokens),
        "answered": len(answered),
        "answer_tokens": answer_tokens,
        "samples": {"nats": loss.sums, "exact_match": exact, "edits": edits},
        "answers": _shown([measure.question_text(row) for row in answered], references, answers),
    }


def _facts(
    model: nn.Module, tokenizer: Any, form: str, sizes: ProbeSizes, precision: torch.dtype | None, progress: bool
) -> dict[str, Any]:
    found = facts(model, tokenizer, limit=sizes.facts_per_kind, form=form, autocast=precision, progress=progress)
    samples = {"greedy": [int(hit) for hit in found.greedy], "logprob": [int(hit) for hit in found.logprob]}

    asked, right = zip(*((question.text, question.answer) for question in found.questions), strict=True)
    return _shares(found.kinds, samples) | {"samples": samples, "answers": _shown(asked, right, found.answers)}


def _instructions(
    model: nn.Module, tokenizer: Any, sizes: ProbeSizes, precision: torch.dtype | None, progress: bool
) -> dict[str, Any]:
    found = follow_instructions(
        model, tokenizer, per_kind=sizes.instructions_per_kind, autocast=precision, progress=progress
    )
    samples = {"followed": [int(done) for done in found.followed]}
    kinds, asked = [each.kind for each in found.instructions], [each.text for each in found.instructions]
    shown = _shown(asked, kinds, found.answers)
    return _shares(kinds, samples) | {"samples": samples, "answers": shown}


def _shares(kinds: Sequence[str], samples: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Each metric's mean over all questions, their number "n", and the same for each kind of question, "by_kind"."""

    def scores(places: Sequence[int]) -> dict[str, Any]:
        means = {name: statistics.fmean(values[place] for place in places) for name, values in samples.items()}
        return means | {"n": len(places)}

    by_kind = {
        kind: scores([place for place, other in enumerate(kinds) if other == kind]) for kind in dict.fromkeys(kinds)
    }
    return scores(range(len(kinds))) | {"by_kind": by_kind}


def _shown(questions: Sequence[str], right: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    whole = list(zip(questions, right, answers, strict=True))
    return [dict(zip(("question", "right", "answer"), row, strict=True)) for row in evenly(whole, SHOWN)]
