"""The base pass answered from disk: what decides whether an input can be, and whether the answer is the same.

A wrong hit would anchor the model to something else without a word, so keys hold all that the base's hidden states
depend on, and what can't be told from ids, mask and positions is not cached.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mask_the_target.base import Base, active_adapters, adapter_layers, adapter_tensors
from mask_the_target.cache import GIB, MIB, CachedBase, HiddenStates, fingerprint, spans
from mask_the_target.context import restarts
from mask_the_target.head import text_config
from mask_the_target.sharding import is_sharded

# All that an input may hold besides flags; the lengths of packed documents say no more than position_ids.
_KEYED = {"input_ids", "attention_mask", "position_ids"}
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class BaseCache:
    """Answers the base passes of one attachment.

    Args:
        settings: where, how large, in which dtype.
        base: the base whose hidden states are stored.
        expected: supervised tokens of one epoch, where they are known: the size is announced and checked before the
            first step, and data that differs from epoch to epoch is noticed.
    """

    def __init__(self, settings: CachedBase, base: Base, expected: int | None = None) -> None:
        self.settings = settings
        self._base = base
        self._store: HiddenStates | None = None
        self._autocast: str | None = None
        # Whether packed documents don't see each other, by what the batch says of its packing: a mask changes it, and
        # flash attention tells documents by their positions in a batch of one row only.
        self._isolated: dict[tuple[bool, frozenset[str]], bool] = {}
        self.expected = expected
        self._missed = 0
        self._off: str | None = None
        self._longest, self._said = _longest_alone(base.model), False
        config = text_config(base.model)
        # Of Llama 4: its temperatures of attention follow the place in the row and not in the document, and so do its
        # chunks before transformers 5.
        limits = [getattr(config, name, None) for name in ("attention_chunk_size", "floor_scale")]
        self._placed_alike = min((limit for limit in limits if isinstance(limit, int)), default=None)

    def hidden(self, inputs: Mapping[str, Any], supervised: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        """The base's final hidden states at the supervised positions, ``[n, d]`` in the stored dtype.

        Args:
            inputs: the base pass's arguments.
            supervised: ``[n]`` sorted indices into the flattened ``[B * T]`` positions.
            compute: runs the base pass on ``inputs`` and gives ``[n, d]``.

        Raises:
            ValueError: at the first call, if an announced epoch would pass the limit or fill the disk.
        """
        if is_sharded(self._base.model):
            return self._hidden_together(inputs, supervised, compute)
        if self._off is not None or not len(supervised) or self._depends_on_company(inputs):
            return compute(inputs)
        reason = self._reason_against(inputs)
        if reason is None and self._store is None:
            reason = self._open(inputs, compute)
        if reason is not None:
            self._stop(reason)
            return compute(inputs)
        store = self._store
        assert store is not None
        starts, given = _restarts(inputs), _given(inputs)
        if starts is not None and given not in self._isolated:
            proved = self._prove_isolation(inputs, supervised, starts, compute)
            if proved is not None:
                self._isolated[given] = proved
        documents, found = self._read(store, inputs, supervised)
        if found is not None:
            return found.to(supervised.device)
        hidden = compute(inputs)
        # Rows that are there already don't count: they stand beside one that isn't, as anchors of many lengths do.
        written = [store.write(document.key, hidden[document.start : document.end]) for document in documents]
        self._missed += sum(d.end - d.start for d, new in zip(documents, written, strict=True) if new)
        if self.expected is not None and self._missed > 1.5 * self.expected + len(supervised):
            self._stop(
                "the sequences differ from epoch to epoch (a random augmentation or packing), so the stored hidden "
                "states are never asked for again"
            )
            return hidden
        return hidden.to(store.dtype)  # so that the first epoch's losses are the later ones'

    def _hidden_together(self, inputs: Mapping[str, Any], supervised: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        """Where all processes gather the weights for a base pass together: from disk if each one finds its sequences,
        else none does. Nothing is written, and the cache must have been opened before, by the whole weights."""
        store, found = self._store, None
        if store is None and self._off is None:
            self._stop(
                "the model is sharded (FSDP, ZeRO-3), and the base's fingerprint needs whole weights. To use it, fill "
                "it before the model is wrapped (attachment.fill_cache)"
            )
        alone = not self._depends_on_company(inputs)
        if store is not None and len(supervised) and alone and self._reason_against(inputs) is None:
            _, found = self._read(store, inputs, supervised)
        missing = torch.tensor(float(found is None), device=supervised.device)
        torch.distributed.all_reduce(missing)
        if found is not None and not missing:
            return found.to(supervised.device)
        return compute(inputs) if store is None else compute(inputs).to(store.dtype)

    def _read(self, store: HiddenStates, inputs: Mapping[str, Any], supervised: Tensor) -> tuple[list[Any], Any]:
        """The documents of the supervised positions, and their stored hidden states ``[n, d]``: None if any isn't."""
        alike = self._placed_alike is None or inputs["input_ids"].shape[1] <= self._placed_alike
        documents = spans(
            inputs["input_ids"],
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
            supervised,
            isolated=alike and self._isolated.get(_given(inputs), False),
        )
        return documents, store.read([d.key for d in documents], [d.end - d.start for d in documents])

    @property
    def stopped(self) -> str | None:
        """Why nothing more is stored, or None."""
        full = self._store is not None and self._store.full
        return self._off or ("it is at its limit, or the disk is full" if full else None)

    def describe(self) -> str:
        """A sentence on what the cache holds."""
        store = self._store
        if store is None:
            return "The base's cache is empty: no batch had a supervised token."
        store.flush()
        size = store.stored_bytes / MIB
        return f"{size:,.1f} MiB of hidden states in {store.folder} ({store.hits} sequences were there already)"

    def flush(self) -> None:
        """Write what is still in memory, for other processes and later runs."""
        if self._store is not None:
            self._store.flush()

    def _depends_on_company(self, inputs: Mapping[str, Any]) -> bool:
        """Whether each row's hidden states are what they are by the longest of the batch; said once."""
        ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
        if self._longest is None or not isinstance(ids, Tensor):
            return False
        longest = self._longest - self._said  # after a longer one, a dynamic embedding goes back for shorter ones only
        if ids.shape[-1] <= longest or (isinstance(positions, Tensor) and int(positions.max()) < longest):
            return False
        if not self._said:
            self._said = True
            warnings.warn(
                f"base='cached': batches with positions beyond {self._longest} run uncached, since this model's rotary "
                "embedding (dynamic, longrope) then changes for every row. The loss is the same.",
                stacklevel=2,
            )
        return True

    def _reason_against(self, inputs: Mapping[str, Any]) -> str | None:
        """Why these inputs can't be cached, or None."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, Tensor):
            return "the batch holds no input_ids (embeddings are given instead)"
        if isinstance(mask, Tensor) and mask.dim() != 2:
            return f"the attention mask {list(mask.shape)} is not [batch, sequence]"
        positions = inputs.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() != 2:  # as those of multimodal models, for each axis
            return f"position_ids {list(positions.shape)} are not [batch, sequence]"
        known = _KEYED | (_PACKING if positions is not None else set())
        other = [name for name, value in inputs.items() if name not in known and not _is_flag(value)]
        if other:
            return f"the base depends on more than token ids: the batch holds {', '.join(map(repr, other))}"
        if self._store is not None and self._autocast != _autocast(ids.device):
            return "the autocast dtype changed since the cache was opened"
        return None

    def _open(self, inputs: Mapping[str, Any], compute: Callable[..., Tensor]) -> str | None:
        """Open the store of this base; the reason against it, where there is one."""
        model, device = self._base.model, inputs["input_ids"].device
        hidden = compute(inputs)
        if not torch.equal(hidden, compute(inputs)):
            return (
                "two base passes over the same batch differ (noise on embeddings, dropout in eval mode, or kernels "
                "that add up in another order each time)"
            )
        self._autocast = _autocast(device)
        dtype = torch.bfloat16 if self.settings.dtype == "bfloat16" else hidden.dtype
        without = set() if self._base.kind == "initial" else {id(tensor) for tensor in adapter_tensors(model)}
        extra = {"base": self._base.kind, "autocast": self._autocast, "stored": str(dtype)}
        if self._base.kind == "initial":  # its weights don't say which adapters are on, nor by which factor
            extra["adapters"] = str(active_adapters(adapter_layers(model)))
        try:
            with self._base.context():
                key, description = fingerprint(model, without=without, **extra)
        except ValueError as error:
            return str(error)
        limit = int(self.settings.limit_gib * GIB)
        store = HiddenStates(self.settings.root / key, description, hidden.shape[1], dtype, limit)
        if self.expected is not None:
            announcement = store.announce(self.expected)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"base='cached': {announcement}", file=sys.stderr, flush=True)
        self._store = store
        return None

    def _prove_isolation(
        self, inputs: Mapping[str, Any], supervised: Tensor, starts: Tensor, compute: Callable[..., Tensor]
    ) -> bool | None:
        """Whether the last supervised document of each row stays as it is when other tokens stand in those before it.

        Same shapes, so same kernels: equal bit for bit if the model keeps packed documents apart. Less would not do, as
        a little of one long document's company is much of a short one's. None if only the first document of each row
        has a supervised token: before it there is nothing to see.
        """
        position = torch.arange(starts.shape[1], device=starts.device)
        wanted = torch.zeros(starts.numel(), dtype=torch.bool, device=starts.device)
        wanted[supervised] = True
        last = torch.where(wanted.reshape(starts.shape), position, -1).amax(1, keepdim=True)  # [B, 1]
        start = torch.where(starts & (position <= last), position, 0).amax(1, keepdim=True)  # [B, 1] of its document
        rows = ((position >= start) & (start > 0)).reshape(-1)[supervised]  # [n]
        if not rows.any():
            return None
        ids = inputs["input_ids"]
        other = torch.where(position < start, (ids == 0).to(ids.dtype), ids)  # 0, and 1 for it: all of them others
        return torch.equal(compute(inputs)[rows], compute({**inputs, "input_ids": other})[rows])

    def _stop(self, reason: str) -> None:
        self._off = reason
        self.flush()
        warnings.warn(
            f"base='cached' is off from here on, and the base pass runs in every step: {reason}. The loss is the same. "
            "Use base='auto' to say so from the start.",
            stacklevel=2,
        )


def _longest_alone(model: Any) -> int | None:
    """Up to how many positions a rotary embedding that follows the batch's longest row stays as it is; else None."""
    limits: list[int] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, Mapping) else [kinds]
        if not any(kind == "longrope" or "dynamic" in kind for kind in kinds if isinstance(kind, str)):
            continue
        parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        parts = [parameters, *(part for part in parameters.values() if isinstance(part, Mapping))]
        names = ("original_max_position_embeddings", "max_position_embeddings")
        told = [part.get(names[0]) for part in parts] + [getattr(config, name, None) for name in names]
        limits.append(min((n for n in told if isinstance(n, int)), default=0))
    return min(limits, default=None)


def _given(inputs: Mapping[str, Any]) -> tuple[bool, frozenset[str]]:
    return len(inputs["input_ids"]) == 1, frozenset(name for name, value in inputs.items() if value is not None)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str))


def _autocast(device: torch.device) -> str:
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "none"


def _restarts(inputs: Mapping[str, Any]) -> Tensor | None:
    """``[B, T]``: where a document starts inside a row; None where no row holds more than one."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor):
        return None
    found = torch.zeros_like(positions, dtype=torch.bool)
    found[:, 1:] = restarts(positions)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor):
        found &= mask.bool()  # padding
    return found.expand(inputs["input_ids"].shape) if found.any() else None
