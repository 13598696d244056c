"""ms-swift: `--external_plugins tmkl_plugin.py --callbacks tmkl`, where tmkl_plugin.py is one line,

    import mask_the_target.integrations.swift

Settings are `TMKL_*` variables of the environment (`TMKL_WEIGHT=0.5 swift sft ...`), which swift's YAML sets under
`ENV:`. Swift takes the labels out of the batch for some of its options and computes the loss from logits; these are
refused when the trainer is built.
"""

from __future__ import annotations

import os
from typing import Any

from swift.callbacks import callbacks_map

from mask_the_target.integrations.settings import PREFIX, callback_from
from mask_the_target.integrations.transformers import TMKLCallback

if __name__.startswith("_swift_external"):
    raise ImportError(
        "give --external_plugins a file of your own with the line `import mask_the_target.integrations.swift`, not "
        "this one: swift looks for modules in a plugin's folder first, and this one has a transformers.py and a trl.py."
    )


def tmkl(args: Any, trainer: Any) -> TMKLCallback:
    """What ``--callbacks tmkl`` is.

    Args:
        args: swift's training arguments.
        trainer: the trainer that is being built.

    Raises:
        ValueError: for settings in which the loss would not be the model's own, or TMKL's terms not exact.
    """
    callback = _callback()
    _check(args, trainer)
    return callback


def _callback() -> TMKLCallback:
    given = {key.lower(): value for key, value in os.environ.items() if key.lower().startswith(PREFIX)}
    callback = None
    if not any(given.get(name, "none") != "none" for name in ("tmkl_max_drift", "tmkl_anchors")):
        callback = callback_from(given, "TMKL_* in the environment")
    if callback is None or callback.options.context_weight:
        raise ValueError(
            "TMKL_CONTEXT_WEIGHT (and TMKL_MAX_DRIFT, TMKL_ANCHORS) don't go with ms-swift: it scales the model's loss "
            "by each batch's share of the step's supervised tokens, and context tokens have a denominator of their own."
        )
    return callback


def _check(args: Any, trainer: Any) -> None:
    from swift.trainers import Seq2SeqTrainer

    if not isinstance(trainer, Seq2SeqTrainer):
        raise ValueError(
            f"{type(trainer).__name__} trains on another loss than the model's own, and TMKL would not be in it. "
            "TMKL is for swift sft (or pt) with task_type causal_lm."
        )
    if args.tuner_type == "full":
        raise ValueError(
            "tuner_type is 'full', which trains the base's own weights. TMKL takes its base from the same model with "
            "the adapter off: set --tuner_type lora."
        )
    template = trainer.template
    binary = template.is_binary_loss_scale
    if binary is None:
        binary = template.loss_scale.is_binary_loss_scale
    takes_labels = {
        f"label_smoothing_factor {args.label_smoothing_factor}": args.label_smoothing_factor > 0,
        f"loss_type {args.loss_type!r}": args.loss_type is not None,
        "enable_dft_loss": args.enable_dft_loss,
        "enable_channel_loss": args.enable_channel_loss,
        "loss_scale, which weighs tokens with more than 0 and 1": not binary,
        f"sequence_parallel_size {template.sequence_parallel_size}": template.sequence_parallel_size > 1,
    }
    for name, wanted in takes_labels.items():
        if wanted:
            raise ValueError(
                f"{name}: for this, swift takes the labels out of the batch and computes the loss from logits, and "
                "TMKL would not be in it. Remove it, or --callbacks tmkl."
            )


_callback()  # a wrong variable is refused now, before a model is loaded
callbacks_map["tmkl"] = tmkl
