"""Time and peak memory of a whole LoRA training step in TRL's SFTTrainer: plain cross-entropy, ours, and the naive way.

    python -m benchmarks.step                           # SmolLM2-135M, 4 x 256 tokens: minutes on two cores
    python -m benchmarks.step --length 256 1024 --checkpointing
    python -m benchmarks.step --prompt 128 --arms ce tmkl context anchors
    python -m benchmarks.step --device cuda --model HuggingFaceTB/SmolLM2-1.7B --length 1024 4096

Each arm is a short run in a process of its own, so that its peak memory is its own; the arms take turns, several
rounds, and the time is the median over all rounds of the steps from the third on. Documents are random tokens, all of
them supervised but for the first --prompt of each, and the same for every arm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import PeakMemory, append_rows, context, reason_of, run_alone, time_limit

# tmkl_cached reads the base's hidden states from a cache that holds all of them. naive runs both models through PEFT's
# own switch and takes the definition on full logits.
ARMS = ("ce", "tmkl", "tmkl_cached", "naive")
# TMKL with the full KL at the prompt's positions too, and with a quarter of all tokens anchors besides.
CONTEXT_ARMS = ("context", "anchors")
SKIPPED_STEPS = 2


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer; with ``--layers``, a toy Llama of that many layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not args.layers:
        from mask_the_target.front.backbones import resolve_model

        path = resolve_model(args.model)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype))
        return model, AutoTokenizer.from_pretrained(path)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype)), tokenizer


def make_trainer(args: argparse.Namespace, output_dir: str, callbacks: list[Any]) -> Any:
    """TRL's SFTTrainer for the arm ``args.alone``: LoRA of rank 16 on all linear layers, one epoch of two batches."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from mask_the_target import TMKL, TMKLCallback, target_masked_kl
    from mask_the_target.anchors import Anchors

    class Naive(SFTTrainer):
        """The base by PEFT's ``disable_adapter``, and full logits of both models."""

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")[:, 1:].flatten()
            with torch.no_grad(), model.disable_adapter():
                base_logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
            logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
            return target_masked_kl(logits, base_logits, labels, num_items=num_items_in_batch).loss

    model, tokenizer = load(args)
    torch.manual_seed(0)
    length = args.length[0]
    # A document beside the special tokens, which a collator or a trainer may treat in its own way.
    documents = torch.randint(16, model.config.vocab_size, (2 * args.batch, length)).tolist()
    rows = {"input_ids": documents}
    if args.prompt:
        rows["completion_mask"] = [[0] * args.prompt + [1] * (length - args.prompt)] * len(documents)
    config = SFTConfig(
        output_dir=output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_length=length,
        completion_only_loss=True if args.prompt else None,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=args.checkpointing,
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if args.alone == "tmkl":
        callbacks = [TMKLCallback(), *callbacks]
    elif args.alone == "tmkl_cached":
        callbacks = [TMKLCallback(base="cached"), *callbacks]
    elif args.alone in CONTEXT_ARMS:
        anchors = None
        if args.alone == "anchors":
            file = Path(output_dir, "anchors.jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text((json.dumps({"text": " ".join(["word"] * (length // 4))}) + "\n") * 64)
            anchors = Anchors(file)
        callbacks = [TMKLCallback(TMKL(context_weight=1.0), anchors=anchors), *callbacks]
    trainer: type[SFTTrainer] = Naive if args.alone == "naive" else SFTTrainer
    return trainer(
        model,
        config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def measure_alone(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the counted steps, and peak memory of the run above nothing and above the loaded model."""
    from transformers import TrainerCallback

    cuda = args.device.startswith("cuda")

    class Clock(TrainerCallback):
        """Milliseconds from the first of a step, its forward, to the end of the optimiser's part."""

        def __init__(self) -> None:
            self.steps: list[float] = []

        def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
            self._start = self._now()

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            self.steps.append(1000 * (self._now() - self._start))

        def _now(self) -> float:
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, folder, [clock])
        with time_limit(args.limit), PeakMemory(args.device) as memory:
            trainer.train()
    return {
        "steps_ms": clock.steps[SKIPPED_STEPS:],
        "peak_mib": memory.peak_mib,
        "extra_mib": memory.extra_mib,
    }


def run(args: argparse.Namespace, length: int, argv: list[str]) -> list[dict[str, object]]:
    """One table, printed, and its rows."""
    results: dict[str, dict[str, Any]] = {arm: {"steps_ms": [], "peak_mib": 0.0, "extra_mib": 0.0} for arm in args.arms}
    with tempfile.TemporaryDirectory() as cache:
        for number in range(args.rounds + 1):
            for arm in args.arms:
                if number == 0 and arm != "tmkl_cached":  # the round before the first only fills the cache
                    continue
                if "not_run" in results[arm]:
                    continue
                print(f"round {number}, {arm} ...", file=sys.stderr)
                arguments = [*argv, "--length", str(length), "--alone", arm]
                answer, reason = run_alone("benchmarks.step", arguments, args.limit, MTT_CACHE=cache)
                if answer is None:
                    results[arm]["not_run"] = reason
                elif number:
                    found = json.loads(answer)
                    results[arm]["steps_ms"] += found["steps_ms"]
                    for name in ("peak_mib", "extra_mib"):
                        results[arm][name] = max(results[arm][name], found[name])

    common = context(args.device) | {"device": args.device, "dtype": args.dtype}
    common |= {"model": f"toy, {args.layers} layers" if args.layers else args.model, "batch": args.batch}
    common |= {"length": length, "prompt": args.prompt, "checkpointing": args.checkpointing, "rounds": args.rounds}
    print(f"\n{common['machine']}, torch {common['torch']}, TRL {common['trl']}, commit {common['commit'] or '-'}")
    print(
        f"{common['model']}: {args.batch} x {length} tokens a step, {args.dtype}, LoRA r 16 on all linear layers",
        end="",
    )
    if args.prompt:
        print(f", {args.prompt} of each without a target", end="")
    print(", gradient checkpointing" if args.checkpointing else "")
    print(f"{'arm':<14}{'ms a step':>11}{'/ ce':>8}{'tokens/s':>11}{'peak MiB':>11}{'/ ce':>8}", end="")
    print(f"{'above model':>13}{'/ ce':>8}")
    rows = []
    ce = results.get("ce", {})
    for arm in args.arms:
        found = results[arm]
        row = common | {"arm": arm, "not_run": found.get("not_run", "")}
        columns = ("ms", "ratio_to_ce", "tokens_per_s", "peak_mib", "peak_to_ce", "extra_mib", "extra_to_ce")
        row |= dict.fromkeys(columns, "")
        rows.append(row)
        if "not_run" in found:
            print(f"{arm:<14}  not run: {found['not_run']}")
            continue
        ms = statistics.median(found["steps_ms"])
        row |= {"ms": f"{ms:.1f}", "tokens_per_s": f"{1000 * args.batch * length / ms:.0f}"}
        row |= {"peak_mib": f"{found['peak_mib']:.0f}", "extra_mib": f"{found['extra_mib']:.0f}"}
        if ce.get("steps_ms"):
            row["ratio_to_ce"] = f"{ms / statistics.median(ce['steps_ms']):.3f}"
            row["peak_to_ce"] = f"{found['peak_mib'] / ce['peak_mib']:.3f}"
            row["extra_to_ce"] = f"{found['extra_mib'] / ce['extra_mib']:.3f}"
        print(f"{arm:<14}{row['ms']:>11}{row['ratio_to_ce']:>8}{row['tokens_per_s']:>11}{row['peak_mib']:>11}", end="")
        print(f"{row['peak_to_ce']:>8}{row['extra_mib']:>13}{row['extra_to_ce']:>8}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default %(default)s")
    parser.add_argument("--model", default="package:smollm2", help="as in mtt; default %(default)s")
    parser.add_argument("--layers", type=int, default=0, help="a toy Llama of so many layers in the model's place")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32, on cuda bfloat16")
    parser.add_argument("--length", type=int, nargs="+", default=[256], help="tokens of a document; default 256")
    parser.add_argument("--batch", type=int, default=4, help="documents a step; default %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run, 3 at least; default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="each arm's turns; default %(default)s")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of each without a target; default %(default)s")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS + CONTEXT_ARMS)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a run may take; default %(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("step.csv"))
    parser.add_argument("--alone", choices=ARMS + CONTEXT_ARMS, help=argparse.SUPPRESS)  # one arm, in this process
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.prompt and not args.prompt < min(args.length) - 1:
        parser.error(f"--prompt {args.prompt} leaves no target in a document of --length {min(args.length)}")
    if args.steps <= SKIPPED_STEPS:
        parser.error(f"--steps {args.steps}: the first {SKIPPED_STEPS} steps are not counted, so 3 at least")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.alone:
        try:
            print(json.dumps(measure_alone(args)))
        except Exception as error:
            sys.exit(reason_of(error))
        return
    for length in args.length:
        append_rows(args.output, run(args, length, argv))


if __name__ == "__main__":
    main()
