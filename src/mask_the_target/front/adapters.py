"""The adapters of `mtt train --adapter NAME`, with the settings of "Mask the Target" (arXiv 2605.29498).

Everywhere rank r is 64, alpha is 2r, dropout is 0.05, and all linear layers of the blocks are adapted:

    lora, dora    PEFT's LoRA and DoRA
    rslora        LoRA scaled by alpha / sqrt(r)
    pissa         LoRA that starts as the top r singular triplets of each weight; saved as plain LoRA of rank 2r
    adalora       ranks 1.5r, pruned to r on average by importance, beta 0.85. The paper's 200 steps before pruning and
                  1,000 after it are at most a tenth and a half of the run here: there, on 120 steps, it never pruned
    vera          shared frozen projections of rank 4r; only vectors are trained, and there is no alpha
    randlora      8 frozen random bases of rank r / 8
    sinelora      W x + (alpha / r) B sin(A x); loading needs `import mask_the_target.sine_lora`
"""

from __future__ import annotations

import difflib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.randlora.layer import RandLoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

ADAPTERS = ("lora", "rslora", "dora", "pissa", "adalora", "vera", "randlora", "sinelora")
RANK = 64
DROPOUT = 0.05
BASES = 8  # of RandLoRA
ORTHOGONALITY = 0.5  # of AdaLoRA's penalty: PEFT's default
# What is reported of a config, where it has it.
SETTINGS = (
    *("peft_type", "r", "init_r", "target_r", "tinit", "tfinal", "total_step", "beta1", "beta2"),
    *("lora_alpha", "randlora_alpha", "lora_dropout", "vera_dropout", "randlora_dropout"),
    *("use_rslora", "use_dora", "init_lora_weights", "d_initial", "projection_prng_key"),
)


def check_name(name: str, known: Sequence[str] = ADAPTERS, kind: str = "adapter") -> None:
    """Raises ValueError, with the nearest valid name, if `name` is not among those that are `known`."""
    if name in known:
        return
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"Unknown {kind} {name!r}. {hint}Known: {', '.join(known)}.")


def check_parts(name: str, alpha: float | None, target_parameters: list[str] | None) -> None:
    """Raises ValueError for a given setting that the adapter `name` doesn't have."""
    if name == "vera" and alpha is not None:
        raise ValueError("VeRA has no alpha: its trained vectors are its scale. Remove lora_alpha.")
    if target_parameters is not None and name in ("adalora", "vera", "randlora", "sinelora"):
        raise ValueError(f"{name} adapts modules, not single parameters. Remove lora_target_parameters.")


def make_adapter(
    name: str,
    *,
    rank: int = RANK,
    alpha: float | None = None,
    dropout: float = DROPOUT,
    target_modules: str | list[str] = "all-linear",
    target_parameters: list[str] | None = None,
    modules_to_save: list[str] | None = None,
    task_type: str = "CAUSAL_LM",
) -> PeftConfig:
    """PEFT's config of the adapter `name`, with the paper's settings where nothing else is given.

    Arguments:
        rank: r. VeRA's projections have 4r; RandLoRA's bases r / 8 each, at least 1; AdaLoRA starts with 1.5r.
        alpha: None: 2r. The update is scaled by alpha / r (rslora: alpha / sqrt(r)). VeRA has none.

    AdaLoRA's schedule is the paper's until AdaLoraSteps fits it to the run.

    Raises ValueError for an unknown name and for what the adapter doesn't have.
    """
    check_name(name)
    check_parts(name, alpha, target_parameters)
    alpha = 2 * rank if alpha is None else alpha
    common: dict[str, Any] = {
        "target_modules": target_modules,
        "modules_to_save": modules_to_save,
        "task_type": task_type,
        "bias": "none",
    }
    if name == "vera":
        return VeraConfig(r=4 * rank, vera_dropout=dropout, **common)
    if name == "randlora":
        of_basis = max(1, round(rank / BASES))
        # PEFT scales by alpha / (rank of a basis), and the scale that is meant is alpha / r.
        scaled = alpha * of_basis / rank
        return RandLoraConfig(r=of_basis, randlora_alpha=scaled, randlora_dropout=dropout, **common)  # type: ignore[arg-type]
    common |= {"lora_alpha": alpha, "lora_dropout": dropout}
    if name == "adalora":
        schedule: dict[str, Any] = dict(adalora_schedule(2000))
        # The penalty is applied by AdaLoraSteps, to the gradients: PEFT adds it to a loss that not every trainer reads.
        return AdaLoraConfig(
            target_r=rank,
            init_r=math.ceil(1.5 * rank),
            beta1=0.85,
            beta2=0.85,
            orth_reg_weight=0.0,
            **common | schedule,
        )
    if name == "sinelora":
        from mask_the_target.sine_lora import SineLoraConfig

        return SineLoraConfig(r=rank, **common)
    if target_parameters is not None:
        common["target_parameters"] = target_parameters  # newer than the oldest PEFT
    return LoraConfig(
        r=rank,
        use_rslora=name == "rslora",
        use_dora=name == "dora",
        init_lora_weights="pissa" if name == "pissa" else True,
        **common,
    )


def adalora_schedule(steps: int) -> dict[str, int]:
    """AdaLoRA's `total_step`, `tinit` and `tfinal`: the paper's 200 and 1,000, or a tenth and a half of a short run."""
    return {"total_step": steps, "tinit": min(200, steps // 10), "tfinal": min(1000, steps // 2)}


def describe(config: PeftConfig) -> dict[str, Any]:
    """The settings that a record of the run shows; JSON values."""
    values = config.to_dict()
    targets = values.get("target_modules")
    found = {key: getattr(values[key], "value", values[key]) for key in SETTINGS if values.get(key) is not None}
    if "target_r" in found:
        del found["r"]  # LoRA's, which AdaLoRA doesn't use
    return found | {"target_modules": targets if isinstance(targets, str) else sorted(targets or [])}


def prepare(model: nn.Module, name: str) -> None:
    """What an adapter needs after it was put into the model, beyond its config.

    RandLoRA: PEFT makes as many bases as full rank takes (72 of rank 8 for a width of 576). The coefficients of all
    but the first 8 start at zero and get no gradient here, so the update is that of 8 bases, in PEFT's own format.

    Raises ValueError for PiSSA of a rank that a weight doesn't have.
    """
    if name == "randlora":
        for module in model.modules():
            if isinstance(module, RandLoraLayer):
                for coefficients in module.randlora_lambda.values():  # [rank of a basis, bases]
                    coefficients.register_hook(_first_bases)
    if name == "pissa":
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer) and "default" in module.lora_A:
                wanted, found = module.r["default"], len(module.lora_A["default"].weight)  # type: ignore[arg-type]
                if found < wanted:
                    raise ValueError(
                        f"PiSSA starts from the top {wanted} singular triplets, and "
                        f"{path.removeprefix('base_model.model.')} has only {found}. Lower lora_r."
                    )


def _first_bases(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[:, BASES:] = 0
    return gradient


# ------------------------------------------------------------------------------------------------------------ PiSSA


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights as they are now, named as in a saved adapter."""
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def save_as_lora(model: PeftModel, folder: Path, initial: Mapping[str, Tensor]) -> None:
    """Save an adapter that started inside the base's weights as plain LoRA of twice the rank, for the true base.

    PiSSA trains `W - s B0 A0 + s B A`: on top of W, that is the LoRA `s [B, -B0] [A; A0]`. `initial` is
    `adapter_weights` from before training. Checkpoints stay as they are: a resumed run takes the same start again.
    """
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "initial"
        start.mkdir()
        save_file(dict(initial), start / "adapter_model.safetensors")
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))


# ---------------------------------------------------------------------------------------------------------- AdaLoRA


class AdaLoraSteps(TrainerCallback):
    """What AdaLoRA does beside the loss, which trainers don't do by themselves.

    - Its schedule is set to the run's number of steps.
    - Before each optimiser step the gradient of its orthogonality penalty is added (after clipping), 0.5 times the
      mean of `||P'P - I||` over the matrices. It is not in the logged loss.
    - After each step ranks are pruned by importance.
    - Checkpoints hold all ranks, pruned ones as zeros, and the running importance, so that a run can be resumed. The
      adapter of the finished run holds the ranks that are left.
    """

    FILE = "adalora.safetensors"

    def __init__(self) -> None:
        self.kept: dict[str, list[bool]] | None = None  # PEFT's rank pattern, kept out of checkpoints

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tuner = kwargs["model"].base_model
        config = tuner.peft_config["default"]
        for key, value in adalora_schedule(state.max_steps).items():
            setattr(config, key, value)
        if args.resume_from_checkpoint:
            self._load(Path(args.resume_from_checkpoint), tuner)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        factors = {
            name: parameter
            for name, parameter in kwargs["model"].named_parameters()
            if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name)
        }
        with torch.enable_grad():
            grams = (p @ p.T if ".lora_A." in name else p.T @ p for name, p in factors.items())  # [r, r]
            distances = [torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
            penalty = ORTHOGONALITY * torch.stack(distances).mean()
            gradients = torch.autograd.grad(penalty, list(factors.values()))
        for parameter, gradient in zip(factors.values(), gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tuner = kwargs["model"].base_model
        config = tuner.peft_config["default"]
        config.rank_pattern = self.kept
        tuner.update_and_allocate(state.global_step + 1)
        self.kept, config.rank_pattern = config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.should_save:
            return
        allocator = kwargs["model"].base_model.rankallocator
        tensors = {f"importance.{name}": tensor for name, tensor in allocator.exp_avg_ipt.items()}
        tensors |= {f"uncertainty.{name}": tensor for name, tensor in allocator.exp_avg_unc.items()}
        tensors |= {f"kept.{name}": torch.tensor(kept) for name, kept in (self.kept or {}).items()}
        save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # From the weights, not from `kept`: an earlier checkpoint may have been loaded as the best.
        model = kwargs["model"]
        model.peft_config["default"].rank_pattern = {
            name: (parameter != 0).flatten().tolist()
            for name, parameter in model.base_model.model.named_parameters()
            if ".lora_E." in name
        }

    def _load(self, checkpoint: Path, tuner: Any) -> None:
        if not (checkpoint / self.FILE).is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no {self.FILE}, which holds what AdaLoRA prunes by. Resume from an earlier "
                "checkpoint, or start again."
            )
        allocator, parameters, kept = tuner.rankallocator, dict(tuner.model.named_parameters()), {}
        for key, tensor in load_file(checkpoint / self.FILE).items():
            kind, name = key.split(".", 1)
            if kind == "kept":
                kept[name] = tensor.tolist()
                continue
            tensor = tensor.to(parameters[name].device)
            (allocator.exp_avg_ipt if kind == "importance" else allocator.exp_avg_unc)[name] = tensor
            allocator.ipt[name] = torch.zeros_like(tensor)
        self.kept = kept or None
