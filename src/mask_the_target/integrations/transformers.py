"""One line for transformers' Trainer and TRL's SFTTrainer: ``callbacks=[TMKLCallback(TMKL(weight=1.0))]``.

The base is settled when the trainer is built (a checkpoint may be loaded later, and the initial adapter would be
gone); the forward is attached when training begins, on top of whatever the trainer has patched by then. The first
optimiser step proves that the loss which the trainer backpropagates is ours, or stops.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import CallbackHandler

from mask_the_target.anchors import AnchorCollator, Anchors
from mask_the_target.attach import Attachment, Totals, attach, attachment_of, cache_of, unwrap
from mask_the_target.base import INITIAL_IS_SHARDED, Base, BaseChoice, require_frozen_rest, resolve_base
from mask_the_target.base_cache import BaseCache
from mask_the_target.budget import DriftBudget
from mask_the_target.cache import CachedBase
from mask_the_target.files import write_whole
from mask_the_target.integrations import trl
from mask_the_target.integrations.first_step import FirstStep
from mask_the_target.objective import IGNORE_INDEX, TMKL

# Of a checkpoint. Not trainer_state.json: what is an ExportableState there is built anew, without our options.
BUDGET_FILE = "drift_budget.json"


class TMKLCallback(TrainerCallback):
    """Trains with CE + weight * target-masked KL and logs both terms as ``ce`` and ``kl`` (nats per token).

    Args:
        options: the objective, see :class:`~mask_the_target.TMKL`.
        base: ``"auto"``, ``"off"``, ``"initial"``, ``"cached"`` (or a :class:`~mask_the_target.CachedBase`) or a
            separate frozen model, see :func:`~mask_the_target.attach`.
        full_kl: also measure and log the full-vocabulary KL as ``full_kl``. The KL at context positions is logged as
            ``context_kl``, where ``options`` have a ``context_weight``.
        anchors: sequences without a target that are added to each training batch, for ``context_weight`` to act on:
            ``"auto"`` (the base writes them before training) or :class:`~mask_the_target.anchors.Anchors`.
        max_drift: the KL at context positions to keep to, nats per token, instead of a fixed ``context_weight``, which
            is then what the weight begins with. It is logged as ``context_weight``, kept in checkpoints, and the same
            on every rank; a budget that was not met is said at the end. See :mod:`~mask_the_target.budget`.

    The model is detached when training ends, also where ``train()`` is interrupted or fails.

    Raises:
        ValueError: at once for anchors or a budget without a ``context_weight``; when the trainer is built, for what
            :func:`~mask_the_target.attach` refuses and for ``label_smoothing_factor``, ``loss_type="dft"``,
            ``nn.DataParallel``, TRL's trainers but SFTTrainer, and anchors that can't be had.
        RuntimeError: before the first step, when the batches would hold no anchors, since the trainer doesn't collate
            with its ``data_collator``; in that step (which is logged for that), when the loss that the trainer
            backpropagates is not ours; later, when a training forward comes without labels or bypasses ours.
    """

    def __init__(
        self,
        options: TMKL = TMKL(),
        base: BaseChoice | Literal["cached"] | CachedBase | nn.Module = "auto",
        *,
        full_kl: bool = False,
        anchors: Literal["auto"] | Anchors | None = None,
        max_drift: float | None = None,
    ) -> None:
        if not isinstance(options, TMKL):
            raise ValueError(f"TMKLCallback takes the options as TMKL(...), got {type(options).__name__}.")
        for name, given in (("anchors", anchors), ("max_drift", max_drift)):
            if given is not None and not options.context_weight:
                raise ValueError(
                    f"{name}={given!r} without a context_weight has no effect: it is the weight of the KL there. Set "
                    "TMKL(context_weight=1.0)."
                )
        self.anchors = Anchors() if anchors == "auto" else anchors
        self._anchor_tokens = 0
        self.max_drift = max_drift
        self._budget = None if max_drift is None else DriftBudget(max_drift, options.context_weight)
        self._totals = Totals()  # of the steps since the last log that a budget has taken from the attachment's
        self.options = options
        self.full_kl = full_kl
        self._choice, self._cached = cache_of(base)
        self._base: Base | None = None
        self._attachment: Attachment | None = None
        self._ahead = False  # attached already for the training that begins
        # The proof that the trainer backpropagates our loss: at the first optimiser step, and by its value at the
        # first log.
        self._first_step: FirstStep | None = None
        self._value_known = True
        self._steps = 0
        self._stop_counting: Callable[[], None] | None = None
        self._built_with: Any = None  # the trainer that was built with it; it may be given to others later
        self._guarded: Any = None  # the trainer whose training gives the model back when it fails
        self._checkpoint: Any = None  # what it was told to go on from

    @property
    def attachment(self) -> Attachment | None:
        """The attachment while training, else None."""
        return self._attachment

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _check_arguments(args)
        if getattr(args, "use_liger_kernel", False):
            # Liger's fused cross-entropy would replace the forward in train(), ours included; its layers may stay.
            keep = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), **keep}
        log_before_reporters(self)
        trainer = self._built_with = _calling_trainer()
        self._release_on_error(trainer, "train")
        if hasattr(trainer, "_tag_names"):  # what TRL's model card is tagged with
            trainer._tag_names = [*trainer._tag_names, "tmkl"]
        model = kwargs.get("model")
        if model is not None:
            inner, configs = unwrap(model)
            self._base = resolve_base(inner, self._choice, configs=configs)
        if self.anchors is not None:
            self._add_anchors(self.anchors, args, kwargs.get("processing_class"))
        if trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            zero3 = trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled()
            if self._base is not None and self._base.kind == "initial" and (trainer.is_fsdp_enabled or zero3):
                raise ValueError(INITIAL_IS_SHARDED)
            self._attach_before_sharding(trainer)

    def _release_on_error(self, trainer: Any, name: str) -> None:
        """Give the model back when this method of ``trainer`` raises, and note which checkpoint ``train`` goes on from.

        Trainers tell callbacks of neither, and the next training on the model, without TMKL, would be regularised
        without a word.
        """
        if trainer is None or self._guarded is trainer:
            return
        self._guarded, run = trainer, getattr(trainer, name)

        @functools.wraps(run)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if name == "train":
                self._checkpoint = kwargs.get("resume_from_checkpoint", args[0] if args else None)
            try:
                return run(*args, **kwargs)
            except BaseException:
                self._release()
                raise

        setattr(trainer, name, guarded)

    def _attach_before_sharding(self, trainer: Any) -> None:
        """FSDP and DeepSpeed take the weights apart before ``on_train_begin``; attaching needs them whole."""
        wrap = trainer._wrap_model

        def wrap_model(model: nn.Module, training: bool = True, **kwargs: Any) -> Any:
            if training:
                self._attach(model, trainer.args)
                self._ahead = True
            return wrap(model, training=training, **kwargs)

        trainer._wrap_model = wrap_model

    def _add_anchors(self, anchors: Anchors, args: TrainingArguments, processing_class: Any) -> None:
        trainer = _calling_trainer()
        if self._base is None or trainer is None or processing_class is None:
            raise ValueError(
                "anchors need the model and its tokenizer when the trainer is built, and a trainer that builds its own "
                "data loader. Give the trainer model= and processing_class=; in a loop of your own, use AnchorCollator."
            )
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        with args.main_process_first(desc="writing anchors"):
            sequences = anchors.sequences(self._base, tokenizer, Path(args.output_dir or "."))
        self._anchor_tokens = sum(len(ids) - 1 for ids in sequences)
        inner = trainer.get_train_dataloader

        def get_train_dataloader() -> Any:
            own = trainer.data_collator
            trainer.data_collator = AnchorCollator(own, sequences, anchors.share, anchors.seed)
            try:
                return inner()
            finally:
                trainer.data_collator = own

        trainer.get_train_dataloader = get_train_dataloader

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._budget is not None and args.should_save:  # by each node, where each keeps its own checkpoints
            trainer = _calling_trainer()  # whose folder is another in each trial of a search
            trial = getattr(trainer, "_trial", None)
            folder = args.output_dir if trainer is None else trainer._get_output_dir(trial=trial)
            file = Path(folder or ".") / f"checkpoint-{state.global_step}" / BUDGET_FILE
            write_whole(file, json.dumps(asdict(self._budget)).encode())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_arguments(args)
        if self.anchors is not None:
            _require_anchors(kwargs["train_dataloader"])
        trainer = _calling_trainer()
        self._release_on_error(trainer, "training_step")  # of a callback that came later than the trainer
        if not self._ahead:
            self._attach(kwargs["model"], args, resumed=state.global_step > 0)
        self._ahead = False
        assert self._attachment is not None
        if trainer is not self._built_with:  # its train() runs already, and no guard sees it fail between steps
            self._attachment.before_forward = functools.partial(self._release_after, trainer)
        cache = self._attachment.cache
        if cache is not None:
            expected = supervised_tokens(kwargs["train_dataloader"], args, context=self.options.context_weight > 0)
            cache.expected = None if expected is None else expected + self._anchor_tokens
        if self.max_drift is not None:
            newest = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            folder = Path(self._checkpoint) if isinstance(self._checkpoint, (str, Path)) else newest
            self._budget = DriftBudget(self.max_drift, self.options.context_weight)
            if state.global_step:
                self._budget = _resumed(self._budget, folder / BUDGET_FILE)
            self._attachment.context_weight, self._totals = self._budget.weight, Totals()
        if self.options.context_weight:
            self._stop_counting = _count_context(_calling_trainer(), self._attachment)

    def _attach(self, model: Any, args: TrainingArguments, *, resumed: bool = False) -> None:
        self._release()  # a training may begin anew within train() (auto_find_batch_size)
        inner, configs = unwrap(model)
        left_over = attachment_of(inner)
        if left_over is not None and left_over.strict:  # another trainer's, which was interrupted
            left_over.detach()
        if self._base is None or (self._base.kind != "model" and self._base.model is not inner):
            base = resolve_base(inner, self._choice, configs=configs)
            if resumed and base.kind == "initial":
                raise ValueError(
                    "base='initial' needs the adapter as it was before training, and this callback came after the "
                    "checkpoint was loaded. Give it to the trainer when that is built: callbacks=[TMKLCallback(...)]."
                )
            self._base = base
        elif self._base.kind != "model":
            require_frozen_rest(inner, configs)  # something may have been unfrozen since the trainer was built
        # A gradient scaler changes the factors, and AdaLoRA's model adds its orthogonality term to the loss after us.
        self._value_known = not (args.fp16 or args.deepspeed) and not any(
            str(getattr(config, "peft_type", "")).endswith("ADALORA") for config in configs.values()
        )
        cache = None if self._cached is None else BaseCache(self._cached, self._base)
        self._attachment = attach(model, self.options, base=self._base, cache=cache, full_kl=self.full_kl)
        self._attachment.strict = True
        self._attachment.keep_logits = type(args).__module__.startswith("trl.") and trl.reads_logits(args)
        self._first_step, self._steps = FirstStep(self._attachment), 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._budget is not None and self._budget.missed:
            warnings.warn(self._budget.missed, stacklevel=2)
        self._release()

    def _release_after(self, trainer: Any) -> None:
        """Give the model back where it isn't this trainer that runs it: its training has failed."""
        if _calling_trainer() is not trainer:
            self._release()

    def _release(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None
        if self._stop_counting is not None:
            self._stop_counting()
            self._stop_counting = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._attachment is not None and self._attachment.cache is not None:
            self._attachment.cache.flush()  # other ranks may be given these sequences in the next epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1
        if self._attachment is not None and self._budget is not None:
            kl = self._step_kl(self._attachment)
            if kl is not None:
                self._attachment.context_weight = self._budget.update(kl)
        if self._attachment is not None and self._attachment.on_backward is not None and self._steps == 1:
            # The value of the loss is proved at the first log: make it this step's, before there is much to lose.
            control.should_log = control.should_log or args.logging_strategy != "no"

    def _step_kl(self, attachment: Attachment) -> float | None:
        """The mean KL of the step's context positions, over all ranks; None without any. It waits for the device."""
        step, attachment.totals = attachment.totals, Totals()
        self._totals = self._totals + step  # apart, so that a step that isn't finite is in no later one's mean
        *_, kl, positions, _, _ = _sum_over_ranks(step, 0.0)
        return kl / positions if positions else None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._attachment is None:
            raise RuntimeError(
                "a step of this training failed, which took TMKL off the model, and the trainer goes on: it would "
                "train without TMKL. Call train() anew, with resume_from_checkpoint if there is one."
            )
        if self._first_step is not None:
            self._first_step.check()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._attachment is None or logs is None or "loss" not in logs:
            return
        totals = self._totals + self._attachment.totals
        if totals.forwards == 0:
            return
        self._totals, self._attachment.totals = Totals(), Totals()
        self._attachment.check_base()
        proof = self._first_step
        *sums, backpropagated, ranks = _sum_over_ranks(totals, 0.0 if proof is None else proof.backpropagated)
        ce, kl, full_kl, supervised, excluded, context_kl, context = sums
        metrics = {"ce": ce / max(1.0, supervised), "kl": kl / max(1.0, supervised)}
        if self.full_kl:
            metrics["full_kl"] = full_kl / max(1.0, supervised)
        if self.options.exclude_base_above is not None:
            metrics["excluded"] = excluded / max(1.0, supervised)
        if self.options.context_weight:
            metrics["context_kl"] = context_kl / max(1.0, context)
        if self._budget is not None:
            metrics["context_weight"] = self._attachment.context_weight
        add_to_logs(logs, state, metrics)
        if self._attachment.on_backward is not None and self._steps:
            self._attachment.on_backward = self._first_step = None
            if self._value_known and not self._attachment.has_aux_loss:
                _check_logged(float(logs["loss"]), backpropagated / ranks / self._steps, self._steps)


def _resumed(budget: DriftBudget, file: Path) -> DriftBudget:
    """The budget as it was at the checkpoint that the trainer goes on from, with the limit that is asked for now."""
    if not file.is_file():
        warnings.warn(f"max_drift: there is no {file}, so the weight begins again at {budget.weight:g}.", stacklevel=2)
        return budget
    return replace(DriftBudget(**json.loads(file.read_text(encoding="utf-8"))), max_drift=budget.max_drift)


def supervised_tokens(dataloader: Any, args: TrainingArguments, *, context: bool = False) -> int | None:
    """Supervised tokens of one epoch (``context``: and those before and between them), where the data set is tokenised
    already; None where that isn't known."""
    dataset: Any = getattr(dataloader, "dataset", None)
    names = getattr(dataset, "column_names", None) or []
    if not hasattr(dataset, "__len__") or "input_ids" not in names:
        return None
    if context:
        return sum(len(row) - 1 for row in dataset["input_ids"])
    if "labels" in names:
        return sum(sum(label != IGNORE_INDEX for label in row[1:]) for row in dataset["labels"])
    masks = [name for name in ("completion_mask", "assistant_masks") if name in names]
    if getattr(args, "completion_only_loss", None) is False:
        masks = [name for name in masks if name != "completion_mask"]
    if not masks:
        return sum(len(row) - 1 for row in dataset["input_ids"])
    rows = zip(*(dataset[name] for name in masks), strict=True)
    return sum(sum(1 for token in zip(*row, strict=True) if all(token)) for row in rows)


def _check_logged(logged: float, ours: float, steps: int) -> None:
    """The first logged loss must be the one that was backpropagated through us. NaN is left to others to stop."""
    if math.isfinite(logged) and math.isfinite(ours) and abs(logged - ours) > 2e-3 + 0.01 * abs(ours):
        raise RuntimeError(
            f"the trainer logged a loss of {logged:.4f} over its first {steps} steps, but {ours:.4f} was "
            "backpropagated through TMKL's: it adds to it, or trains on another. Check for a subclass of the trainer "
            "that changes compute_loss."
        )


def _require_anchors(dataloader: Any) -> None:
    collator = getattr(dataloader, "collate_fn", None)
    while collator is not None and not isinstance(collator, AnchorCollator):
        collator = getattr(collator, "data_collator", None)  # as transformers' RemoveColumnsCollator has it
    if collator is None:
        raise RuntimeError(
            "the trainer's get_train_dataloader doesn't collate with its data_collator, so no anchor would be in a "
            "batch. Collate there with AnchorCollator(collator, sequences) of mask_the_target.anchors, and leave "
            "anchors= out."
        )


def _check_arguments(args: TrainingArguments) -> None:
    of_trl = [kind.__name__ for kind in type(args).__mro__ if kind.__module__.startswith("trl.")]
    if of_trl and "SFTConfig" not in of_trl:  # DPO asks the forward for log-probabilities, and would be given ours
        raise ValueError(
            f"TRL's trainer with a {type(args).__name__} trains on another loss than the model's own, and TMKL would "
            "not be in it, whatever terms it has. TMKLCallback is for SFTTrainer and transformers' Trainer."
        )
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} makes the trainer compute its own loss from logits, "
            "without TMKL. Set it to 0: TMKL already keeps the non-targets' distribution from collapsing."
        )
    if getattr(args, "loss_type", None) == "dft":
        raise ValueError("loss_type='dft' replaces the cross-entropy that TMKL is defined with. Use loss_type='nll'.")
    if args.n_gpu > 1:
        raise ValueError(
            f"the trainer would wrap the model in nn.DataParallel over {args.n_gpu} devices, whose copies run the "
            "original's weights. Start it with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one."
        )


def add_to_logs(logs: dict[str, Any], state: TrainerState, figures: dict[str, float]) -> None:
    """In a callback's ``on_log``: add figures to what reporters are given, and to the history, which has the entry."""
    logs.update(figures)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(figures)


def log_before_reporters(callback: TrainerCallback) -> None:
    """Move ``callback`` to the front of the trainer's callbacks, so that reporters see what it adds to the logs.

    Trainers put the user's callbacks behind TensorBoard's, W&B's and the progress bar's, and hand a callback no way to
    the list; the handler that is calling us is one frame up.
    """
    handler = _calling(CallbackHandler)
    if handler is None:
        name = type(callback).__name__
        print(f"{name}: its figures reach the trainer's log history only, not its reporters.", file=sys.stderr)
        return
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)


def _calling(kind: type) -> Any:
    """The object of this kind in whose method we are being called, or None."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _calling_trainer() -> Any:
    from transformers import Trainer  # slow: it loads datasets

    return _calling(Trainer)


def _count_context(trainer: Any, attachment: Attachment) -> Callable[[], None]:
    """Tell ``attachment`` the denominators of each step, when ``trainer`` has collected the step's batches.

    The trainer counts supervised tokens alone (over ranks too, where it averages over them), and knows them before the
    first forward; context positions are counted in the same place. The result gives the trainer its own method back.
    """
    if trainer is None:
        raise RuntimeError("context_weight needs the trainer that is calling TMKLCallback, and none was found.")
    if not attachment.shifts_labels and type(trainer.args).__module__.startswith("trl."):
        raise ValueError(
            f"context_weight doesn't go with {type(attachment.model).__name__} in TRL, which shifts the labels of a "
            "model that takes them as they are."
        )
    collect, own = trainer.get_batch_samples, vars(trainer).get("get_batch_samples")

    def get_batch_samples(*arguments: Any, **kwargs: Any) -> Any:
        batches, num_items = collect(*arguments, **kwargs)
        attachment.step_counts = None  # without num_items, each batch has its own denominators
        if num_items is not None:
            here = sum(attachment.count_context(batch) for batch in batches)
            count = torch.tensor([here], device=trainer.args.device)
            if trainer.args.average_tokens_across_devices:
                count = trainer.accelerator.gather(count)
            # Ranks that share a batch (tensor, context and sequence parallelism) count it once, as the trainer does.
            attachment.step_counts = (num_items, count.sum() // _ranks_of_a_batch(trainer))
        return batches, num_items

    def restore() -> None:
        if own is None:
            vars(trainer).pop("get_batch_samples", None)
        else:
            trainer.get_batch_samples = own

    trainer.get_batch_samples = get_batch_samples
    return restore


def _ranks_of_a_batch(trainer: Any) -> int:
    """How many ranks are given the same batch; transformers 4 asks accelerate, and 5 its trainer."""
    asked = [getattr(trainer, name, None) for name in ("get_tp_size", "get_cp_size", "get_sp_size")]
    if any(asked):
        return math.prod(size() for size in asked if size is not None)
    return getattr(getattr(trainer.accelerator, "parallelism_config", None), "non_data_parallel_size", 1)


def _sum_over_ranks(totals: Totals, backpropagated: Tensor | float) -> list[float]:
    """ce, kl, full_kl, supervised, excluded, context_kl, context, backpropagated and the number of ranks.

    The one place where the device is waited for, at log time.
    """
    values = [totals.ce, totals.kl, totals.full_kl, totals.supervised, totals.excluded, totals.context_kl]
    values += [totals.context, backpropagated, 1.0]
    device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # others have no float64
    stacked = torch.stack([torch.as_tensor(value, dtype=dtype, device=device) for value in values])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(stacked)
    return stacked.tolist()
