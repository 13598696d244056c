"""torchtune's own LoRA recipe for one device, with another loss: any of its `*_lora_single_device` configs runs.

`tune run examples/torchtune_lora.py --config llama3_2/1B_lora_single_device tmkl_weight=1.0`
"""

import runpy
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig
from torchtune import config
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.modules.peft import disable_adapter

from mask_the_target import TMKL, linear_target_masked_kl

RECIPES = Path(torchtune.__file__).parents[1] / "recipes"  # torchtune forbids importing them
Recipe: Any = runpy.run_path(str(RECIPES / "lora_finetune_single_device.py"))["LoRAFinetuneRecipeSingleDevice"]


def plain_head(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose weight makes logits of the final hidden states."""
    output = getattr(model, "output", None)
    if type(model) is not TransformerDecoder or not isinstance(output, TiedLinear | torch.nn.Linear):
        raise ValueError(
            f"{type(model).__name__} with {type(output).__name__} as its head: this loss takes a TransformerDecoder "
            "with a linear head, which base and adapted model share."
        )
    return output.tied_module if isinstance(output, TiedLinear) else output


class TMKLRecipe(Recipe):
    """The loss is CE + weight * KL, from final hidden states: no logits of the whole vocabulary are held."""

    def __init__(self, cfg: DictConfig) -> None:
        self.tmkl = TMKL(weight=cfg.tmkl_weight)
        if cfg.model.get("apply_lora_to_output"):
            raise ValueError(
                "apply_lora_to_output adapts the head, which base and adapted model share here. Set it to False."
            )
        if cfg.device == "cpu" and cfg.epochs > 1 and not cfg.get("save_adapter_weights_only"):
            raise ValueError(
                f"epochs={cfg.epochs} on a CPU: there, saving after an epoch merges the adapter into the model in use, "
                "and the base is lost. Set save_adapter_weights_only=True."
            )
        super().__init__(cfg)
        self.sums: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(3, device=self._device))

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        model, log_dict = self._model, self._metric_logger.log_dict
        self.head = plain_head(model)
        model.unembed = lambda h: model.norm(h)  # the forward ends at the final hidden states

        def log_with_ours(payload: dict[str, Any], step: int) -> None:
            ce, kl, tokens = self.sums[step - 1].tolist()
            self.sums.clear()
            log_dict({**payload, "ce": ce / tokens, "kl": kl / tokens}, step=step)

        self._metric_logger.log_dict = log_with_ours

    def _loss_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        labels = torch.hstack((labels[..., 1:], self.ignore_labels_cache[: labels.shape[0]]))
        self._model.eval()  # no dropout in the base; the adapter's is skipped with it
        with torch.no_grad(), disable_adapter(self._model):
            base_hidden = self._model(**batch)
        self._model.train()
        with self.activations_handling_ctx:
            hidden = self._model(**batch)
        rows = hidden.flatten(0, 1), base_hidden.flatten(0, 1), self.head.weight, labels.flatten()
        result = linear_target_masked_kl(*rows, self.tmkl, head_bias=getattr(self.head, "bias", None))
        # The recipe multiplies each loss by its tokens, and divides by those of the whole step.
        sums = result.supervised * torch.stack([result.ce, result.kl, result.ce.new_ones(())])
        self.sums[self.global_step] += sums
        return result.loss


@config.parse
def main(cfg: DictConfig) -> None:
    config.log_config(recipe_name="TMKLRecipe", cfg=cfg)
    recipe = TMKLRecipe(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(main())
