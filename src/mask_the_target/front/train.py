"""`mtt train`: TRL's own SFT run, with TMKL as one more option.

Everything that TRL's `trl sft` reads from a YAML file or the command line means the same here. Our part is what comes
before the weights (checks that answer with a sentence), between tokenisation and the first step (supervised tokens,
labels inside the vocabulary), and around the loop (a bad loss stops the run, Ctrl-C leaves a checkpoint).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mask_the_target import attach
from mask_the_target.anchors import Anchors
from mask_the_target.files import write_whole
from mask_the_target.front import rival_losses
from mask_the_target.front.adapters import (
    AdaLoraSteps,
    adapter_weights,
    describe,
    make_adapter,
    prepare,
    save_as_lora,
)
from mask_the_target.front.backbones import DEFAULT_MODEL, find_model
from mask_the_target.front.data import Data, check_labels, column_names, has_context, load_data
from mask_the_target.front.drift_log import LogDrift
from mask_the_target.front.options import Settings, parse
from mask_the_target.front.record import last_figures, model_card, new_record, write_json
from mask_the_target.front.rivals import RIVALS
from mask_the_target.integrations.transformers import supervised_tokens

# What a resumed run must not change: it would no longer be the run that the checkpoint belongs to.
FIXED_ON_RESUME = ("model", "data", "method", "seed", "adapter", "lora")


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a whole step; the message says how to go on."""


class BadLossError(RuntimeError):
    """Loss or gradients became NaN or infinite; the message says where the batch was saved."""


# ------------------------------------------------------------------------------------------- guards around the loop


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) lets the step end, saves a checkpoint and stops; the second acts at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: the caller handles signals
            self._previous.clear()

    def _handle(self, number: int, frame: Any) -> None:
        self.stopped = True
        print("\nStopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.", file=sys.stderr)
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()


def stop_on_bad_loss(trainer: Any) -> None:
    """Make `trainer` (any transformers Trainer) stop before the optimizer's step when loss or gradient is not finite.

    The batch is saved in `output_dir/bad_batch` (batch.safetensors and batch.json); weights and checkpoints stay as
    they were. Raises BadLossError out of `trainer.train()`. Trainer's own `logging_nan_inf_filter`, which writes an
    average into the log instead, is switched off, so that the check costs no further synchronisation.
    """
    trainer.args.logging_nan_inf_filter = False
    inner = trainer.training_step
    last: dict[str, Any] = {}

    def training_step(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        last.clear()
        last.update(inputs)
        loss = inner(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            raise _bad_batch(trainer, last, "loss", float(loss))
        return loss

    class CheckGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if getattr(trainer.accelerator, "scaler", None) is not None:
                return  # fp16: the scaler skips such steps itself
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None and p.requires_grad]
            if not torch.isfinite(torch.nn.utils.get_total_norm(grads)):
                raise _bad_batch(trainer, last, "gradient", float("nan"))

    trainer.training_step = training_step
    trainer.add_callback(CheckGradients())


def _bad_batch(trainer: Any, batch: Mapping[str, Any], what: str, value: float) -> BadLossError:
    from safetensors.torch import save_file

    folder = Path(trainer.args.output_dir) / "bad_batch"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: v.detach().cpu().contiguous() for key, v in batch.items() if isinstance(v, torch.Tensor)}
    save_file(tensors, folder / "batch.safetensors")
    step = trainer.state.global_step
    write_json(
        folder / "batch.json",
        {
            "what": what,
            "value": str(value),
            "optimizer_steps_done": step,
            "epoch": trainer.state.epoch,
            "shapes": {key: list(tensor.shape) for key, tensor in tensors.items()},
            "other": {key: repr(v)[:500] for key, v in batch.items() if key not in tensors},
        },
    )
    checkpoint = last_checkpoint(Path(trainer.args.output_dir))
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been saved yet."
    return BadLossError(
        f"The {what} became {value} in step {step + 1}: training stopped before that step changed the weights. Its "
        f"batch is in {folder}. {kept} Try a lower learning rate, or look at the batch for broken rows."
    )


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest *whole* checkpoint: its trainer_state.json, which the Trainer writes last, can be read."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((folder / "trainer_state.json").read_text())["global_step"]), folder))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


# --------------------------------------------------------------------------------------------------------- the run


def run(settings: Settings, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, save a plain PEFT adapter with model card and run.json in output_dir, and return run.json's content.

    Raises Interrupted after a signal (a checkpoint is saved), BadLossError on a NaN or infinite loss, and ValueError
    or FileNotFoundError with a sentence for input that cannot work.
    """
    training = settings.training
    output = Path(training.output_dir)
    data, path = _find_data_and_model(settings)
    record = new_record(settings, data)
    resume = _resume(output, training.resume_from_checkpoint, record)

    training.resume_from_checkpoint = str(resume) if resume else None
    stop = StopOnSignal()
    ours: list[TrainerCallback] = [*callbacks, stop]
    if settings.tmkl.method == "tmkl":
        ours.append(settings.tmkl.callback())
    ours += rival_losses.callbacks(settings.tmkl)
    if data.drift:
        ours.append(LogDrift(data.drift))
    if settings.tmkl.adapter == "adalora":
        ours.append(AdaLoraSteps())
    trainer = _build_trainer(settings, data, path, ours)
    initial = adapter_weights(trainer.model) if settings.tmkl.adapter == "pissa" else None
    record["supervision"] = _check_tokenised(trainer, data)
    if settings.tmkl.method in RIVALS:
        rival_losses.install(trainer, settings.tmkl)
    stop_on_bad_loss(trainer)
    main_process = trainer.is_world_process_zero()
    if main_process:
        write_json(output / "run.json", record)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    finally:
        stop.restore()
        record["seconds"] += time.monotonic() - started
        record["log_history"] = trainer.state.log_history
        record["adapter_settings"] = describe(trainer.model.peft_config["default"])
        if main_process:
            write_json(output / "run.json", record)
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        again = f"mtt train {settings.config or ''} --resume_from_checkpoint last".replace("  ", " ")
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is in "
            f"{output}. Go on with: {again} (and the other options as before)."
        )
    trainer.save_model(str(output))
    if initial is not None and main_process:
        save_as_lora(trainer.model, output, initial)
    record |= {
        "status": "complete",
        "steps": trainer.state.global_step,
        "metrics": last_figures(trainer.state.log_history),
    }
    if main_process:
        write_whole(output / "README.md", model_card(record).encode())
        write_json(output / "run.json", record)
    return record


def _find_data_and_model(settings: Settings) -> tuple[Data, str]:
    """The data, and where the model lies; checked against each other before its weights are read."""
    data = load_data(settings)
    settings.model.model_name_or_path = settings.model.model_name_or_path or DEFAULT_MODEL
    path, config = find_model(settings.model.model_name_or_path, settings.model.model_revision)
    if "labels" in (data.train.column_names or []) and hasattr(data.train, "__len__"):
        check_labels(data.train, config.get_text_config().vocab_size, data.name)
    if settings.recommended:
        _recommend_anchors(settings, data)
    return data, path


def _recommend_anchors(settings: Settings, data: Data) -> None:
    """What the evidence has for data whose every token is a target: TMKL.recommended() has no prompts to hold there."""
    images = {"image", "images"} & set(column_names(data.train))  # anchors are text
    if images or has_context(data.train, vars(settings.training)):
        return
    tmkl = settings.tmkl
    tmkl.tmkl_weight, tmkl.tmkl_context_weight, tmkl.anchors = 0.0, 1.0, "auto"
    print(
        f"Note: every token of {data.name} is a target, so there are no prompts to hold. The base writes "
        f"{Anchors().count} short sequences first and is held at these: tmkl_weight 0, tmkl_context_weight 1, "
        "anchors auto (docs/weight.md). Give any tmkl_ option to choose otherwise.",
        file=sys.stderr,
    )


def _build_trainer(settings: Settings, data: Data, path: str, callbacks: list[TrainerCallback]) -> Any:
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    model_init = {
        "revision": settings.model.model_revision,
        "attn_implementation": settings.model.attn_implementation,
        "dtype": settings.model.dtype,
    }
    settings.training.model_init_kwargs = {**model_init, **(settings.training.model_init_kwargs or {})}
    try:
        trainer = SFTTrainer(
            model=path,
            args=settings.training,
            train_dataset=data.train,
            eval_dataset=data.test,
            quantization_config=get_quantization_config(settings.model),
            peft_config=_adapter_config(settings) or get_peft_config(settings.model),
            callbacks=callbacks,
        )
    except ValueError as error:
        if "chat_template is not set" not in str(error):
            raise
        raise ValueError(
            f"{data.name} holds conversations, and the tokenizer of {settings.model.model_name_or_path} has no chat "
            "template to write them with, as is usual for a base model. Set chat_template_path to a .jinja file or to "
            "a model that has one, or use data whose prompt and completion are plain text."
        ) from error
    if settings.tmkl.adapter is not None:
        assert trainer.model is not None
        prepare(trainer.model, settings.tmkl.adapter)
    return trainer


def _adapter_config(settings: Settings) -> Any:
    """PEFT's config of the adapter that was chosen by name; None: TRL's own LoRA options."""
    name, model = settings.tmkl.adapter, settings.model
    if name is None:
        return None
    return make_adapter(
        name,
        rank=model.lora_r,
        alpha=None if name == "vera" else model.lora_alpha,
        dropout=model.lora_dropout,
        target_modules=model.lora_target_modules,
        target_parameters=model.lora_target_parameters,
        modules_to_save=model.lora_modules_to_save,
        task_type=model.lora_task_type,
    )


def fill_cache(settings: Settings) -> str:
    """Run the base over one epoch of the training data and keep its hidden states; what is there already is skipped.

    Returns a sentence on what the cache holds. Raises ValueError with a sentence for input that cannot work, and when
    the cache stops growing (its limit, or the disk's).
    """
    settings.tmkl.method, settings.tmkl.base = "tmkl", "cached"
    data, path = _find_data_and_model(settings)
    options = settings.tmkl.options()
    if not options.weight and not has_context(data.train, vars(settings.training)):
        raise ValueError(
            f"there is nothing to fill a cache with: every token of {data.name} is a target, and tmkl_weight is 0. "
            "Training keeps the hidden states of anchors as it comes to them: mtt train --base cached."
        )
    trainer = _build_trainer(settings, data, path, [])
    loader = trainer.get_train_dataloader()
    with attach(trainer.model, options, base=settings.tmkl.base_choice()) as attachment:
        cache = attachment.cache
        assert cache is not None
        cache.expected = supervised_tokens(loader, settings.training, context=options.context_weight > 0)
        for batch in tqdm(loader, desc="base pass", unit="batch"):
            with trainer.accelerator.autocast():
                attachment.fill_cache(trainer._prepare_inputs(batch))
            if cache.stopped:
                raise ValueError(f"the cache could not be filled: {cache.stopped}.")
        return cache.describe()


def _check_tokenised(trainer: Any, data: Data) -> dict[str, int]:
    rows: Any = trainer.train_dataset
    if not hasattr(rows, "__len__") or "labels" not in rows.column_names:
        return {}  # streamed, or prepared on the fly: nothing to count yet
    dropped = 0 if trainer.args.packing else len(data.train) - len(rows)  # packing makes fewer rows of all documents
    head = trainer.model.get_output_embeddings()
    vocabulary = head.weight.shape[0] if head is not None else trainer.model.config.get_text_config().vocab_size
    found = check_labels(rows, vocabulary, dropped=dropped)
    if found.unsupervised:
        print(
            f"Note: {found.unsupervised} of {found.documents} sequences have no supervised token (an empty completion, "
            "or one cut off by max_length); they teach nothing.",
            file=sys.stderr,
        )
    return asdict(found)


def _resume(output: Path, wanted: str | bool | None, record: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from. Refuses to mix two runs in one folder, and to go on with other settings."""
    newest = last_checkpoint(output) if output.is_dir() else None
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        if newest is not None or (output / "adapter_config.json").exists():
            raise ValueError(
                f"{output} already holds a run. Add --resume_from_checkpoint last to go on with it, or choose "
                "another --output_dir."
            )
        return None
    if str(wanted).lower() in ("true", "last"):
        if newest is None:
            raise ValueError(f"There is no whole checkpoint in {output} to resume from. Leave the option out to start.")
        checkpoint = newest
    else:
        checkpoint = Path(str(wanted))
        if not (checkpoint / "trainer_state.json").is_file():
            raise FileNotFoundError(f"{checkpoint} is not a whole checkpoint: it has no trainer_state.json.")
    try:
        before = json.loads((checkpoint.parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return checkpoint  # made by TRL itself
    for key in FIXED_ON_RESUME:
        now, then = json.loads(json.dumps(record[key], default=str)), before.get(key)
        if now != then:
            raise ValueError(
                f"This run differs from the one in {checkpoint.parent}: {_difference(key, then, now)}. Go on with the "
                "same settings, or choose another --output_dir."
            )
    record["seconds"] = float(before.get("seconds", 0.0))
    return checkpoint


def _difference(key: str, then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        key = next(name for name in now | then if now.get(name) != then.get(name))
        then, now = then.get(key), now.get(key)
    return f"{key} was {then!r} and is now {now!r}"


def cache_main(argv: Sequence[str]) -> int:
    """The command `mtt cache`."""
    print(fill_cache(parse(argv)))
    return 0


def main(argv: Sequence[str]) -> int:
    """The command `mtt train`."""
    settings = parse(argv)
    record = run(settings)
    output = settings.training.output_dir
    print(f"Saved the adapter, its model card (README.md) and run.json in {output} ({record['seconds']:.0f} s).")
    print(f"Measure it: mtt eval --model {record['model']} --adapter {output}")
    return 0
