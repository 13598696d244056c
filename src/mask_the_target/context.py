"""The positions that fine-tuning throws away: those of the prompt, where there is no target to contest.

At them the full KL to the base holds the model in place, at the cost of the head's products alone, since both models'
passes have run over them. A context position is a real one whose next token exists and isn't supervised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mask_the_target.objective import IGNORE_INDEX

_PLACEHOLDER = re.compile(r"(image|video|audio|vision|visual|speech)\w*_(token|patch)_(id|index)s?")


def context_mask(
    inputs: Mapping[str, Any], targets: Tensor, placeholders: tuple[int, ...] = (), *, shifted: bool = True
) -> Tensor:
    """``[B, T]`` bool: real positions without a target.

    Left out are padding, the last token of each document (what follows it is another document or nothing), and
    placeholders of images and sounds with the positions that would predict them.

    Args:
        inputs: of the model's forward: attention_mask ``[B, T]``, position_ids (a document starts where they don't
            grow by one, or are 0 on all axes where they have several) and input_ids, as far as there are any.
        targets: ``[B, T]``, -100 where there is none.
        placeholders: token ids, see :func:`placeholders_of`.
        shifted: position t predicts token t + 1; False for models that don't shift their labels.

    Raises:
        ValueError: where real positions or document boundaries can't be told.
    """
    mask, positions, ids = (inputs.get(name) for name in ("attention_mask", "position_ids", "input_ids"))
    if mask is not None and getattr(mask, "shape", None) != targets.shape:
        raise ValueError(
            "context_weight needs to know which positions are real, and the attention mask "
            f"{list(getattr(mask, 'shape', [type(mask).__name__]))} is not [batch, sequence] {list(targets.shape)}. "
            "Give a mask of 0 and 1, or packed documents by position_ids."
        )
    if positions is None and any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
        raise ValueError("context_weight needs position_ids to tell packed documents apart. Add them to the batch.")
    if mask is None and positions is None:
        last = targets.shape[1] - 1 - shifted  # the last one that can have a target
        if last >= 0 and (targets[:, last] == IGNORE_INDEX).any():
            raise ValueError(
                "context_weight needs to know which positions are real: a row ends without a target, which may be "
                "padding, and the batch has no attention mask. Give a mask of 0 and 1 (of ones, if nothing is padded)."
            )
    real = mask.bool() if isinstance(mask, Tensor) else torch.ones_like(targets, dtype=torch.bool)
    real = real.to(targets.device)
    found = real & (targets == IGNORE_INDEX)
    outside = torch.zeros_like(real)
    if isinstance(ids, Tensor) and placeholders:
        outside = torch.isin(ids, torch.tensor(placeholders, device=ids.device)).to(targets.device)
        found &= ~outside
    if shifted:
        next_is_real = torch.zeros_like(real)
        next_is_real[:, :-1] = (real & ~outside)[:, 1:]
        if isinstance(positions, Tensor):
            of_images = positions.dim() > 2  # [axes, B, T]
            starts = (positions == 0).all(0)[:, 1:] if of_images else restarts(positions)
            next_is_real[:, :-1] &= ~starts.expand(len(real), -1).to(real.device)
        found &= next_is_real
    return found


def restarts(positions: Tensor) -> Tensor:
    """``[B, T - 1]`` of position_ids ``[B, T]``: which tokens from the second on start another document, as
    positions don't grow by one there."""
    return positions[:, 1:] != positions[:, :-1] + 1


def placeholders_of(model: nn.Module) -> tuple[int, ...]:
    """Token ids that stand for images, video or sound in a model's config, also in the configs inside it."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    nested = [values, *(value for value in values.values() if isinstance(value, dict))]
    named = [value for part in nested for name, value in part.items() if _PLACEHOLDER.fullmatch(str(name))]
    each = [id for value in named for id in (value if isinstance(value, (list, tuple)) else [value])]
    return tuple(sorted({id for id in each if type(id) is int}))


def sample(positions: Tensor, tokens: int | None, of: Tensor | int, generator: torch.Generator) -> Tensor:
    """A share of ``positions [m]``, uniformly without replacement: ``tokens`` of all ``of`` positions of the step."""
    count = len(positions)
    if tokens is None or not count:
        return positions
    kept = min(count, -(-tokens * count // max(int(of), count)))
    return positions[torch.randperm(count, generator=generator)[:kept].sort().values.to(positions.device)]
