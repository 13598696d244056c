"""`mtt diagnostic`: what each objective does to a distribution, on a model small enough to see it.

A character transformer learns English from scratch, then LoRA adapts it to another language with CE alone, with CE +
full-vocabulary KL and with CE + TMKL; after the paper's controlled diagnostic. Two parts, with the same base:

* adaptation: random windows of the new language; measured on held-out text of both languages.
* by heart: one small batch, again and again, measured on itself. Nearly every context has one continuation there, so
  the minimisers are known: CE + w * full KL ends at ``p_a = (onehot + w p_b) / (1 + w)``, whose ``p_a(y)`` is capped
  at ``(1 + w p_b(y)) / (1 + w)``; CE + w * TMKL lets ``p_a(y)`` rise to 1. Both keep the shape of the rest.
"""

from __future__ import annotations

import copy
import io
import itertools
import shlex
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mask_the_target.attach import attach
from mask_the_target.files import write_whole
from mask_the_target.front.backbones import package_folder
from mask_the_target.front.options import check_numbers, settings_parser
from mask_the_target.front.probes import TEXT_SOURCES, measuring
from mask_the_target.front.record import versions, write_json
from mask_the_target.front.report import machine
from mask_the_target.objective import TMKL, target_masked_kl

LANGUAGES = ("dutch", "italian", "portuguese", "spanish")  # in Latin script, with at least 30,000 characters
CONTEXT = 128  # characters
PRETRAINING_ROWS, ADAPTATION_ROWS, MEASURED_ROWS = 8, 4, 16  # windows of CONTEXT characters
BY_HEART = (4, 64)  # windows, characters
PRETRAINING_RATE = 2e-3
RANK = 16
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": CONTEXT,
    "use_cache": False,
}
Metrics = dict[str, float]


@dataclass(frozen=True)
class Diagnostic:
    """What is run. The defaults took 43 minutes on two busy cores (AMD EPYC)."""

    languages: str = "dutch,italian"
    seeds: int = 2  # of LoRA's initialisation and the order of the data; the pretrained model is one
    pretraining_steps: int = 450
    steps: int = 80
    learning_rate: float = 3e-3
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, whole=("seeds", "pretraining_steps", "steps"), positive=("learning_rate", "weight"))
        for language in self.language_names():
            if language not in LANGUAGES:
                raise ValueError(f"--languages has {language!r}; known, by commas: {', '.join(LANGUAGES)}.")
        if len(set(self.language_names())) < len(self.language_names()):
            raise ValueError(f"--languages names one twice: {self.languages}.")

    def language_names(self) -> list[str]:
        """`languages`, split at the commas."""
        return [name.strip() for name in self.languages.split(",")]

    def objectives(self) -> dict[str, TMKL | None]:
        """What is compared, by name; None is plain cross-entropy."""
        return {
            "CE": None,
            "CE + full KL": TMKL(weight=self.weight, mask_target=False),
            "CE + TMKL": TMKL(weight=self.weight),
        }


# ----------------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Text:
    """A text as token ids: `train` [n], and `held_out` [MEASURED_ROWS, CONTEXT], windows from a part of its own."""

    train: Tensor
    held_out: Tensor


def read_texts(languages: Sequence[str]) -> tuple[str, dict[str, Text]]:
    """The characters that are tokens, in order of their ids, and the texts "english" and `languages`.

    English is the World English Bible, the others are the conversations of chatterbot-corpus. Characters are those
    that English has at least 100 times; accents and all other characters are dropped, since the pretrained model would
    have no embedding for them.

    Raises ModuleNotFoundError when a package that holds a text is missing.
    """
    raw = {"english": TEXT_SOURCES["bible"]()}
    folder = package_folder("chatterbot_corpus", "mtt diagnostic", "pip install --no-deps chatterbot-corpus")
    raw |= {language: _conversations(folder / "data" / language) for language in languages}
    counts = Counter(_without_accents(raw["english"]))
    characters = "".join(sorted(character for character, count in counts.items() if count >= 100))
    texts = {}
    for name, text in raw.items():
        ids = encode(text, characters)
        cut = len(ids) * 9 // 10  # held out: of English the last books, of a language a tenth of its conversations
        texts[name] = Text(ids[:cut], evenly_cut(ids[cut:], MEASURED_ROWS))
    return characters, texts


def _conversations(folder: Path) -> str:
    """All conversations of a language in one order that is the same everywhere, none twice."""
    import yaml

    found: dict[str, None] = {}
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            found[" ".join(str(turn) for turn in turns)] = None
    texts = list(found)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return " ".join(texts[place] for place in order.tolist())


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def encode(text: str, characters: str) -> Tensor:
    """Token ids [n] of the text's known characters, without accents, runs of white space as one space."""
    ids = {character: place for place, character in enumerate(characters)}
    known = " ".join("".join(c for c in _without_accents(text) if c in ids or c.isspace()).split())
    return torch.tensor([ids[character] for character in known])


def evenly_cut(ids: Tensor, count: int) -> Tensor:
    """`count` windows of CONTEXT tokens, evenly over `ids`, none overlapping: [count, CONTEXT]."""
    stride = len(ids) // count
    if stride < CONTEXT:
        raise ValueError(f"{count} windows of {CONTEXT} characters don't fit a text of {len(ids)} characters.")
    return torch.stack([ids[place * stride :][:CONTEXT] for place in range(count)])


def random_windows(ids: Tensor, rows: int, seed: int) -> Iterator[Tensor]:
    """Batches [rows, CONTEXT] of windows that begin anywhere in `ids`, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - CONTEXT + 1, (rows, 1), generator=generator)
        yield ids[starts + torch.arange(CONTEXT)]


# ------------------------------------------------------------------------------------------ training and measuring


def optimise(model: nn.Module, batches: Iterable[Tensor], steps: int, learning_rate: float) -> Iterator[int]:
    """AdamW on the trainable weights, 5% warm-up, cosine, gradients clipped at 1; yields the number of steps done.

    Raises ValueError if the loss is not finite.
    """
    from transformers import get_cosine_schedule_with_warmup

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    model.train()
    for step, ids in enumerate(itertools.islice(batches, steps), 1):
        loss = model(input_ids=ids, labels=ids).loss
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} at step {step}; try a lower --learning_rate.")
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [n, V] at every position of `ids` [rows, length] but each window's last, whose target is not there."""
    with measuring(model):
        return model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()


def compare(logits: Tensor, base_logits: Tensor, ids: Tensor) -> Metrics:
    """Means over the positions: cross-entropy, p_a(y), and both KLs from base to adapted, in nats per character."""
    targets = ids[:, 1:].flatten()
    masked = target_masked_kl(logits, base_logits, targets, TMKL())
    full = target_masked_kl(logits, base_logits, targets, TMKL(mask_target=False))
    return {
        "loss": masked.ce.item(),
        "target_probability": target_probabilities(logits, ids).mean().item(),
        "masked_kl": masked.kl.item(),
        "full_kl": full.kl.item(),
    }


def target_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """p(y) at every position that `logits_of` gives for `ids`: [n]."""
    return logits.softmax(1).gather(1, ids[:, 1:].reshape(-1, 1)).squeeze(1)


def points(steps: int) -> list[int]:
    """The steps after which a run is measured, closer together at the start; 0 is the base."""
    return sorted({round(steps * share) for share in (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)})


def pretrain(characters: str, english: Text, steps: int) -> nn.Module:
    """The base: a Llama of 6 layers, trained on English from scratch (seed 0)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(characters), **SIZES))
    batches = random_windows(english.train, PRETRAINING_ROWS, seed=0)
    for _ in tqdm(optimise(model, batches, steps, PRETRAINING_RATE), total=steps, desc="pretraining on English"):
        pass
    return model.eval()


def adapt(
    base: nn.Module,
    objective: TMKL | None,
    batches: Iterable[Tensor],
    measured: Mapping[str, Tensor],
    settings: Diagnostic,
    seed: int,
    bar: Any,
) -> list[dict[str, Any]]:
    """LoRA on a copy of `base`, trained on `batches`; what `compare` says of each `measured` text at `points`."""
    from peft import LoraConfig, get_peft_model

    base_logits = {name: logits_of(base, ids) for name, ids in measured.items()}
    torch.manual_seed(seed)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), lora)

    def look(step: int) -> dict[str, Any]:
        found = {name: compare(logits_of(model, ids), base_logits[name], ids) for name, ids in measured.items()}
        return {"step": step, **found}

    wanted = points(settings.steps)
    found = [look(0)]
    with nullcontext() if objective is None else attach(model.train(), objective):
        for step in optimise(model, batches, settings.steps, settings.learning_rate):
            bar.update()
            if step in wanted:
                found.append(look(step))
    return found


def run(settings: Diagnostic, command: str = "mtt diagnostic") -> dict[str, Any]:
    """Everything that diagnostic.json holds.

    Raises ModuleNotFoundError when a package that holds a text is missing, ValueError if a loss is not finite.
    """
    started = time.monotonic()
    languages = settings.language_names()
    characters, texts = read_texts(languages)
    base = pretrain(characters, texts["english"], settings.pretraining_steps)
    pretrained = time.monotonic()
    held = texts["english"].held_out
    english = logits_of(base, held)

    runs: list[dict[str, Any]] = []
    caps = {}
    total = len(languages) * len(settings.objectives()) * 2 * settings.seeds
    with tqdm(total=total * settings.steps, desc="adapting") as bar:
        for language in languages:
            text = texts[language]
            rows, length = BY_HEART
            for seed in range(settings.seeds):
                batch = next(random_windows(text.train, rows, seed=1000 + seed))[:, :length]
                base_p = target_probabilities(logits_of(base, batch), batch)
                cap = ((1 + settings.weight * base_p) / (1 + settings.weight)).mean().item()
                caps[f"{language}, seed {seed}"] = cap
                for name, objective in settings.objectives().items():
                    about = {"language": language, "objective": name, "seed": seed}
                    bar.set_description(f"{language}, {name}, seed {seed}")
                    batches = random_windows(text.train, ADAPTATION_ROWS, seed)
                    measured = {"english": held, "new": text.held_out}
                    found = adapt(base, objective, batches, measured, settings, seed, bar)
                    runs.append({"part": "adaptation", **about, "points": found})
                    found = adapt(base, objective, itertools.repeat(batch), {"new": batch}, settings, seed, bar)
                    runs.append({"part": "by heart", **about, "points": found})
    return {
        "command": command,
        "settings": asdict(settings),
        "constants": {
            "model": SIZES,
            "characters": characters,
            "parameters": sum(weight.numel() for weight in base.parameters()),
            "pretraining": {"rows": PRETRAINING_ROWS, "context": CONTEXT, "learning_rate": PRETRAINING_RATE},
            "adaptation": {"rows": ADAPTATION_ROWS, "context": CONTEXT, "lora_rank": RANK, "lora_alpha": 2 * RANK},
            "by heart": dict(zip(("rows", "context"), BY_HEART, strict=True)),
            "measured_positions": held.numel() - len(held),
            "training_characters": {name: len(text.train) for name, text in texts.items()},
        },
        "versions": versions(),
        "machine": machine(),
        "seconds": {"pretraining": pretrained - started, "adapting": time.monotonic() - pretrained},
        "base_english_loss": compare(english, english, held)["loss"],
        "full_kl_caps": caps,
        "runs": runs,
    }


# ---------------------------------------------------------------------------------------------------------- report


def _values(results: Mapping[str, Any], part: str, objective: str, text: str, metric: str) -> list[list[float]]:
    """One list of values, over the points, for each language and seed."""
    return [
        [point[text][metric] for point in run["points"]]
        for run in results["runs"]
        if run["part"] == part and run["objective"] == objective
    ]


def table(results: Mapping[str, Any]) -> str:
    """At the last step, means over the seeds, as Markdown. "±" is half the range over the seeds."""
    lines = [
        "| language | objective | English loss, rise | new language: loss | p(target) | masked KL | full KL "
        "| by heart: p(target) | cap of full KL | masked KL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(values: Sequence[float], sign: str = "") -> str:
        half = (max(values) - min(values)) / 2
        return f"{sum(values) / len(values):{sign}.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")

    for language in dict.fromkeys(run["language"] for run in results["runs"]):
        for objective in dict.fromkeys(run["objective"] for run in results["runs"]):
            own = {
                part: [
                    run["points"]
                    for run in results["runs"]
                    if (run["part"], run["language"], run["objective"]) == (part, language, objective)
                ]
                for part in ("adaptation", "by heart")
            }
            adapted, heart = own["adaptation"], own["by heart"]
            cells = [
                language,
                objective,
                cell([found[-1]["english"]["loss"] - found[0]["english"]["loss"] for found in adapted], "+"),
                *(
                    cell([found[-1]["new"][metric] for found in adapted])
                    for metric in ("loss", "target_probability", "masked_kl", "full_kl")
                ),
                cell([found[-1]["new"]["target_probability"] for found in heart]),
                cell([cap for name, cap in results["full_kl_caps"].items() if name.startswith(f"{language},")])
                if objective == "CE + full KL"
                else "",
                cell([found[-1]["new"]["masked_kl"] for found in heart]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PANELS = (
    ("adaptation", "english", "loss", "held-out English\nloss, nats per character"),
    ("adaptation", "new", "loss", "held-out new language\nloss, nats per character"),
    ("adaptation", "new", "target_probability", "held-out new language\nmean p(target)"),
    ("adaptation", "new", "masked_kl", "held-out new language\nmasked KL to the base, nats"),
    ("by heart", "new", "target_probability", "one batch by heart\nmean p(target)"),
    ("by heart", "new", "masked_kl", "one batch by heart\nmasked KL to the base, nats"),
)


def write_figure(results: Mapping[str, Any], path: Path) -> None:
    """Six panels over the steps: the mean over languages and seeds, thick, and each run, thin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).flatten()
    steps = [point["step"] for point in results["runs"][0]["points"]]
    styles = (("#c2410c", "-", "o"), ("#6d28d9", "--", "s"), ("#0f766e", ":", "^"))
    names = dict.fromkeys(run["objective"] for run in results["runs"])
    for axis, (part, text, metric, title) in zip(axes, PANELS, strict=True):
        for name, (color, line, marker) in zip(names, styles, strict=True):
            runs = _values(results, part, name, text, metric)
            for values in runs:
                axis.plot(steps, values, line, color=color, linewidth=0.7, alpha=0.45)
            mean = [sum(values) / len(values) for values in zip(*runs, strict=True)]
            axis.plot(steps, mean, line, color=color, marker=marker, linewidth=2, markersize=6, label=name)
        if (part, metric) == ("by heart", "target_probability"):
            caps = list(results["full_kl_caps"].values())
            cap = sum(caps) / len(caps)
            axis.axhline(cap, color="#374151", linewidth=1, linestyle="-.")
            axis.annotate("cap of CE + full KL", (0, cap), xytext=(2, 4), textcoords="offset points", fontsize=9)
            axis.axhline(1, color="#9ca3af", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[3:]:
        axis.set_xlabel("steps of adaptation")
    axes[0].legend(frameon=False, handlelength=3.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    write_whole(path, buffer.getvalue())


# --------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str]) -> int:
    """The command `mtt diagnostic`."""
    parser = settings_parser(
        Diagnostic,
        prog="mtt diagnostic",
        description="Pretrain a character transformer on English, adapt it to other languages with CE, CE + full KL "
        "and CE + TMKL, and measure what each does to the distributions. It took 43 minutes on two busy cores.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/diagnostic"), help="folder of the results")
    options = vars(parser.parse_args(list(argv)))
    output: Path = options.pop("output")
    settings = Diagnostic(**options)
    package_folder("matplotlib", "the figure of mtt diagnostic", "pip install matplotlib")
    package_folder("yaml", "mtt diagnostic", "pip install pyyaml")
    output.mkdir(parents=True, exist_ok=True)  # what can't be written is refused before the work
    started = time.monotonic()
    results = run(settings, shlex.join(["mtt", "diagnostic", *argv]))
    write_json(output / "diagnostic.json", results)
    write_figure(results, output / "diagnostic.png")
    print(f"English loss of the base: {results['base_english_loss']:.3f} nats per character.")
    print(table(results))
    print(f"{time.monotonic() - started:.0f} s. In {output}: diagnostic.json, diagnostic.png.")
    return 0
