"""litgpt's LoRA recipe with another loss: `python examples/litgpt_lora.py CHECKPOINT_DIR --tmkl_weight 1.0`.

It is litgpt/finetune/lora.py for one device, without validation; its options are that one's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from litgpt.args import TrainArgs
from litgpt.data import Alpaca, DataModule
from litgpt.finetune.lora import get_dataloaders, get_longest_seq_length, get_lr_scheduler, save_lora_checkpoint
from litgpt.lora import GPT, Config, LoRALayer, mark_only_lora_as_trainable
from litgpt.parser_config import save_hyperparameters
from litgpt.prompts import save_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.utils import (
    CLI,
    CycleIterator,
    check_valid_checkpoint_dir,
    choose_logger,
    copy_config_files,
    get_default_supported_precision,
    instantiate_torch_optimizer,
)

from mask_the_target import TMKL, linear_target_masked_kl
from mask_the_target.head import LogitTransform
from mask_the_target.objective import TMKLResult


@contextmanager
def without_head(model: GPT) -> Iterator[None]:
    """The forward ends at the final hidden states: no logits of the whole vocabulary are held."""
    head, softcap = model.lm_head, model.config.final_logit_softcapping
    model.lm_head, model.config.final_logit_softcapping = torch.nn.Identity(), None
    try:
        yield
    finally:
        model.lm_head, model.config.final_logit_softcapping = head, softcap


@contextmanager
def adapter_off(model: GPT) -> Iterator[None]:
    """The base: to litgpt, a layer of rank 0 is the pretrained one, without LoRA's dropout. No weight changes."""
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("LoRA is merged into the model's weights: the base is lost. Load the checkpoint again.")
    ranks = [layer.r for layer in layers]
    for layer in layers:
        layer.r = 0
    try:
        yield
    finally:
        for layer, rank in zip(layers, ranks, strict=True):
            layer.r = rank


def tmkl_loss(fabric: L.Fabric, model: torch.nn.Module, batch: dict[str, torch.Tensor], options: TMKL) -> TMKLResult:
    """In place of the recipe's `logits = model(input_ids)` and `chunked_cross_entropy`."""
    gpt = model.module
    with without_head(gpt):
        with torch.no_grad(), adapter_off(gpt):
            base_hidden = model(batch["input_ids"])
        hidden = model(batch["input_ids"])
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # output n predicts token n + 1
    with fabric.autocast():
        return linear_target_masked_kl(
            hidden.flatten(0, 1),
            base_hidden.flatten(0, 1),
            gpt.lm_head.linear.weight,
            targets.flatten(),
            options,
            head_bias=gpt.lm_head.linear.bias,
            logit_transform=LogitTransform(softcap=gpt.config.final_logit_softcapping),
        )


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora-tmkl"),
    precision: str | None = None,
    tmkl_weight: float = 1.0,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(global_batch_size=16, micro_batch_size=1, lr_warmup_steps=100, epochs=5),  # noqa: B008
    optimizer: str | dict = "AdamW",
    seed: int = 1337,
) -> None:
    options = TMKL(weight=tmkl_weight)
    data = Alpaca() if data is None else data
    check_valid_checkpoint_dir(checkpoint_dir, raise_error=True)
    # Without lora_head, which would adapt the head that base and adapted model share here.
    lora = {name: value for name, value in locals().items() if name.startswith("lora_")}
    config = Config.from_file(checkpoint_dir / "model_config.yaml", **lora)
    precision = precision or get_default_supported_precision(training=True)
    logger = choose_logger("csv", out_dir, name=f"finetune-{config.name}", log_interval=train.log_interval)
    fabric = L.Fabric(devices=1, precision=precision, loggers=logger)
    fabric.launch()

    loader, _ = get_dataloaders(fabric, data, Tokenizer(checkpoint_dir), train)
    accumulation = train.gradient_accumulation_iters(devices=1)
    max_steps = min(train.epochs * (len(loader) // accumulation), train.max_steps or float("inf"))
    fabric.seed_everything(seed)
    with fabric.init_module():
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(optimizer, model.parameters()))
    scheduler = get_lr_scheduler(optimizer, warmup_steps=train.lr_warmup_steps, max_steps=max_steps)
    # litgpt's own load_checkpoint would run what a pickle says.
    model.load_state_dict(torch.load(checkpoint_dir / "lit_model.pth", mmap=True, weights_only=True), strict=False)
    model.max_seq_length = min(get_longest_seq_length(loader.dataset)[0], train.max_seq_length or float("inf"))

    batches = CycleIterator(loader)
    for step in range(1, max_steps + 1):
        means = torch.zeros(3, device=fabric.device)
        for _ in range(accumulation):
            result = tmkl_loss(fabric, model, next(batches), options)
            fabric.backward(result.loss / accumulation)
            means += torch.stack([result.loss.detach(), result.ce, result.kl]) / accumulation
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % train.log_interval == 0:
            loss, ce, kl = means.tolist()
            fabric.print(f"step {step}: loss {loss:.4f}, ce {ce:.4f}, kl {kl:.4f}")
            fabric.log_dict({"loss": loss, "ce": ce, "kl": kl}, step=step)

    final = out_dir / "final"  # for `litgpt merge_lora`
    final.mkdir(parents=True, exist_ok=True)
    save_lora_checkpoint(fabric, model, final / "lit_model.pth.lora")
    copy_config_files(checkpoint_dir, final)
    save_hyperparameters(setup, final)
    save_prompt_style(data.prompt_style, final)


if __name__ == "__main__":
    CLI(setup)
