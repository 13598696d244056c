"""The base's final hidden states on disk, so that the base pass is paid once and not every epoch.

The base distribution at a position is exactly its final hidden state times the frozen head: ``d`` numbers a token
instead of a whole vocabulary. :func:`fingerprint` names the base, :func:`spans` names what a batch needs of it, and
:class:`HiddenStates` keeps it. Whatever is wrong on the disk costs a recomputation, never a wrong base.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

MIB, GIB = 2**20, 2**30
SHARD_BYTES = 64 * MIB  # the buffer becomes a shard at this size
FREE_BYTES = GIB  # what is always left on the disk
FORMAT = "1"
_SPAN_OVERHEAD, _SHARD_OVERHEAD = 24, 1024  # a span's key and offset; a shard's header
_STALE_SECONDS = 24 * 3600
_SETTLED_NS = 2 * 10**9  # coarser than any file system's clock
_VOLATILE = {"_name_or_path", "transformers_version", "use_cache"}  # of a config: they don't change what it computes
# What wrappers put into the names of weights that they leave as they are.
_WRAPPERS = (".base_layer", ".original_module", ".token_adapter", "_orig_mod.", "_checkpoint_wrapped_module.")
_HOLE = np.iinfo(np.int64).min


@dataclass(frozen=True)
class CachedBase:
    """``base=CachedBase(...)``: the base's hidden states are computed once and then read from the disk.

    Attributes:
        base: what is cached: ``"off"``, ``"initial"`` or ``"auto"``, as without a cache.
        folder: where the caches of all models lie. None is ``$MTT_CACHE``, else ``mask-the-target`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache``.
        limit_gib: the most that this base's cache may take, in GiB. Beyond it the rest runs uncached.
        dtype: what is stored: ``"model"``, the hidden states as they are, or ``"bfloat16"``, rounded.

    Raises:
        ValueError: if a value is not one of these.
    """

    base: Literal["off", "initial", "auto"] = "auto"
    folder: Path | str | None = None
    limit_gib: float = 50.0
    dtype: Literal["model", "bfloat16"] = "model"

    def __post_init__(self) -> None:
        if self.base not in ("off", "initial", "auto"):
            raise ValueError(
                f"CachedBase has base={self.base!r}; use 'auto', 'off' or 'initial'. A separate model can't be cached: "
                "pass it as base= itself."
            )
        if not 0 < self.limit_gib < math.inf:
            raise ValueError(f"CachedBase has limit_gib={self.limit_gib!r}; it is a size in GiB and must be above 0.")
        if self.dtype not in ("model", "bfloat16"):
            raise ValueError(
                f"CachedBase has dtype={self.dtype!r}; use 'model', which stores the hidden states as they are, or "
                "'bfloat16', which halves float32's size."
            )

    @property
    def root(self) -> Path:
        """The folder in which each base has a folder of its own."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        if os.environ.get("MTT_CACHE"):
            return Path(os.environ["MTT_CACHE"]).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mask-the-target"


def fingerprint(model: nn.Module, *, without: Set[int] = frozenset(), **extra: str) -> tuple[str, dict[str, Any]]:
    """A name for what ``model`` computes: its weights as they are now, its class, its config, and the libraries.

    Call it in the base's context. The same base has the same name under any adapter whose weights are left out.

    Args:
        model: the inner causal LM, whole on this process.
        without: ``id`` of each tensor that is not part of the base: the adapters' when they are off.
        extra: anything else that changes the hidden states or how they are stored (autocast's dtype, stored dtype).

    Returns:
        32 hexadecimal digits, and the description that they are the hash of, as JSON.

    Raises:
        ValueError: if weights are sharded or not loaded, so that this process doesn't see them.
    """
    # state_dict and not named_parameters: it has the scales of quantised weights as well. Buffers that aren't in it
    # are derived from the config, but may be patched (rotary frequencies) or cast with the model.
    derived = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    weights: dict[str, Tensor] = {}
    for name, tensor in {**derived, **model.state_dict(keep_vars=True)}.items():
        if not isinstance(tensor, Tensor) or id(tensor) in without:
            continue
        if tensor.is_meta or hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id") or "_fsdp_wrapped" in name:
            raise ValueError(
                f"the weight {name!r} is sharded or not loaded, so the base can't be identified on this process and "
                "its hidden states can't be cached. Attach before the trainer shards the model, or don't cache."
            )
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        weights[name] = tensor
    distinct = {id(tensor): tensor for tensor in weights.values()}  # tied weights are hashed once
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashlib works without the interpreter's lock
        hashed = dict(zip(distinct, pool.map(_tensor_digest, distinct.values()), strict=True))
    table = [(name, str(t.dtype), list(t.shape), hashed[id(t)]) for name, t in sorted(weights.items())]

    config = getattr(model, "config", None)
    configs = {"": config} | {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    description = {
        "format": FORMAT,
        "model": type(model).__name__,
        "config": getattr(config, "to_diff_dict", dict)(),
        "attention": {name: getattr(each, "_attn_implementation", None) for name, each in configs.items()},
        "transformers": transformers.__version__,
        "weights": {"tensors": len(table), "digest": _json_digest(table)},
        "extra": extra,
    }
    description = json.loads(
        json.dumps(description, default=str),
        object_hook=lambda table: {key: value for key, value in table.items() if key not in _VOLATILE},
    )
    return _json_digest(description), description


def _json_digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor made of tensors: quantised by torchao
        names, context = tensor.__tensor_flatten__()
        return _json_digest([str(context), *(_tensor_digest(getattr(tensor, name)) for name in names)])
    return _digest(tensor.detach().cpu())


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return digest.hexdigest()


@dataclass(frozen=True)
class CachedSpan:
    """One document's supervised positions: rows ``start`` to ``end`` of the batch's ``[n]``, under a 16-byte key."""

    key: bytes
    start: int
    end: int


def spans(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, supervised: Tensor, *, isolated: bool
) -> list[CachedSpan]:
    """Split a batch into documents, each with a key of all that its hidden states depend on besides the model.

    A document starts at each row's start, and where ``position_ids`` don't grow by one. Its key covers the ids and
    positions of its tokens, the mask between its first and last token, and which of its tokens are supervised; padding
    around it is left out. Documents without a supervised token have no span.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 0 at padding, or None.
        position_ids: ``[B, T]`` or ``[1, T]``; None is 0 to T - 1 in each row, left padding included.
        supervised: ``[n]``, indices into the flattened ``[B * T]``, ascending.
        isolated: documents of a row don't see each other. Otherwise all that is before one is part of its key.

    Returns:
        Spans that cover 0 to n without a gap, in order.

    Raises:
        ValueError: if a shape is another.
    """
    rows, length = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device).expand(rows, length)
    if attention_mask.shape != input_ids.shape or position_ids.shape not in ((rows, length), (1, length)):
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} and position_ids {list(position_ids.shape)} must have one "
            f"number for each of input_ids {list(input_ids.shape)} to be cached. Don't cache the base of this model."
        )
    columns = (input_ids, attention_mask, position_ids.expand(rows, length))
    table = torch.stack([column.to(input_ids.device, torch.int64) for column in columns]).cpu().numpy()  # [3, B, T]
    wanted = supervised.cpu().numpy()
    edges = np.searchsorted(wanted, np.arange(rows + 1) * length)
    found = []
    for row, (low, high) in enumerate(itertools.pairwise(edges)):
        own = wanted[low:high] - row * length
        starts = np.append(0, np.flatnonzero(np.diff(table[2, row]) != 1) + 1)
        bounds = np.append(starts, length)
        document = np.searchsorted(starts, own, side="right") - 1  # of each supervised position
        cuts = [*np.searchsorted(document, np.unique(document)), len(own)]
        for first, last in itertools.pairwise(cuts):
            start = bounds[document[first]] if isolated else 0
            end = bounds[document[first] + 1]
            ids, mask, positions = table[:, row, start:end]
            key = _key(ids, mask, positions, own[first:last] - start)
            found.append(CachedSpan(key, int(low + first), int(low + last)))
    return found


def _key(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, supervised: np.ndarray) -> bytes:
    counts = mask != 0
    counts[supervised] = True  # a padding token's own hidden state depends on its id
    kept = np.flatnonzero(counts)
    mask = mask[kept[0] : kept[-1] + 1]
    # Some collators number the documents of a row in the mask: relative to the first token that counts.
    mask = np.where(mask != 0, mask - mask[np.argmax(mask != 0)], _HOLE)
    parts = (ids[kept], positions[kept], mask, supervised - kept[0])
    digest = hashlib.blake2b(np.array([len(part) for part in parts], "<i8").tobytes(), digest_size=16)
    for part in parts:
        digest.update(part.astype("<i8").tobytes())
    return digest.digest()


@dataclass(eq=False)
class _Shard:
    path: Path
    size: int  # bytes
    hidden: Tensor  # [rows, d], a memory map
    keys: Tensor  # [S, 16] uint8
    offsets: Tensor  # [S + 1] int64
    checksum: str
    verified: bool = False


class HiddenStates:
    """One base's cached hidden states: a folder of safetensors shards, shared by any number of processes.

    Shards appear under their name only when they are complete, and each is verified before its first use. One that is
    damaged or doesn't belong is named in a warning and deleted, and what it held is computed again.

    Args:
        folder: this base's own folder, of one hidden size and dtype; made if it isn't there.
        description: what the folder's name is the hash of; kept beside the shards as ``base.json``.
        hidden_size: ``d``.
        dtype: what is stored.
        limit_bytes: the most that the folder may hold.

    Attributes:
        hits: spans that were read.
        misses: spans that weren't: a batch that lacks one of them is computed anew, and counts with all.
        full: the store stopped growing, at its limit or the disk's.

    Raises:
        ValueError: if the folder can't be made or written.
    """

    def __init__(
        self, folder: Path, description: dict[str, Any], hidden_size: int, dtype: torch.dtype, limit_bytes: int
    ) -> None:
        self.folder, self.hidden_size, self.dtype, self.limit_bytes = Path(folder), hidden_size, dtype, limit_bytes
        self.hits, self.misses, self.full = 0, 0, False
        self._shards: dict[str, _Shard] = {}  # by file name
        self._ignored: set[str] = set()  # names of files that are of no use
        self._index: dict[bytes, tuple[_Shard, int, int]] = {}
        self._buffer: dict[bytes, Tensor] = {}
        self._buffered = 0  # bytes
        self._seen = 0  # the folder's mtime when it was scanned
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.tmp"):  # left by processes that were killed
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                        path.unlink()
            if not (self.folder / "base.json").exists():
                self._put("base.json", json.dumps(description, indent=2, sort_keys=True).encode())
        except OSError as error:
            raise ValueError(
                f"the cache folder {self.folder} can't be written ({error}). Choose another with folder= or $MTT_CACHE."
            ) from error
        self._scan()

    @property
    def stored_bytes(self) -> int:
        """What the shards and the buffer hold."""
        return sum(shard.size for shard in self._shards.values()) + self._buffered

    def read(self, keys: Sequence[bytes], counts: Sequence[int]) -> Tensor | None:
        """The hidden states of ``keys`` one after the other, ``[sum of counts, d]`` on the CPU in the stored dtype.

        None unless all are there, each with its count of rows. The tensor is the caller's own.
        """
        parts = self._find(keys, counts)
        if parts is None:  # another process may have written it since
            self._scan()
            parts = self._find(keys, counts)
        if parts is None:
            self.misses += len(keys)
            return None
        self.hits += len(keys)
        return torch.cat([torch.empty(0, self.hidden_size, dtype=self.dtype), *parts])

    def write(self, key: bytes, hidden: Tensor) -> bool:
        """Keep ``hidden`` ``[rows, d]`` under ``key``, unless it is there or the store is full; False if it is there.

        It is readable at once, and on the disk after :meth:`flush` or when 64 MiB have come together.
        """
        if hidden.dim() != 2 or hidden.shape[1] != self.hidden_size or not len(hidden):
            raise ValueError(f"hidden states {list(hidden.shape)} can't be stored as [rows, {self.hidden_size}].")
        if key in self._index or key in self._buffer:
            return False
        if self.full:
            return True
        size = hidden.numel() * self.dtype.itemsize + _SPAN_OVERHEAD
        try:
            self._require_room(self._buffered + size)
        except OSError as error:
            self._stop(error)
            return True
        self._buffer[key] = hidden.detach().to("cpu", self.dtype, copy=True)
        self._buffered += size
        if self._buffered >= SHARD_BYTES:
            self.flush()
        return True

    def flush(self) -> None:
        """Write the buffer as one shard. If the disk refuses, the store stops growing; nothing is raised."""
        if not self._buffer:
            return
        self._scan()  # what others wrote since counts towards the limit
        buffer, size, self._buffer, self._buffered = self._buffer, self._buffered, {}, 0
        hidden = torch.cat(list(buffer.values()))
        keys = torch.tensor([list(key) for key in buffer], dtype=torch.uint8)
        offsets = torch.tensor([0, *(len(part) for part in buffer.values())]).cumsum(0)
        metadata = {"format": FORMAT, "checksum": _digest(hidden, keys, offsets)}
        shard = save({"hidden": hidden, "keys": keys, "offsets": offsets}, metadata)
        try:
            self._require_room(size)
            self._put(f"{uuid.uuid4().hex}.safetensors", shard)
        except OSError as error:
            self._stop(error)
        else:
            self._scan()

    def announce(self, tokens: int) -> str:
        """Say what ``tokens`` supervised positions take, before training. What is stored counts as part of it.

        Raises:
            ValueError: if that is over the limit, or leaves less than 1 GiB on the disk.
        """
        needed = tokens * self.hidden_size * self.dtype.itemsize
        what = (
            f"the base's hidden states of {tokens:,} tokens ({self.hidden_size} x {self.dtype} each) take "
            f"{_size(needed)}, of which {_size(self.stored_bytes)} are stored"
        )
        try:
            self._require_room(max(0, needed - self.stored_bytes) + self._buffered)
        except OSError as error:
            smaller = "dtype='bfloat16' stores less, " if self.dtype.itemsize > 2 else ""
            raise ValueError(
                f"{what}: {error}. {smaller}limit_gib= allows more, folder= takes another disk; or train uncached."
            ) from error
        return f"{what}, in {self.folder}"

    def _find(self, keys: Sequence[bytes], counts: Sequence[int]) -> list[Tensor] | None:
        parts = []
        for key, count in zip(keys, counts, strict=True):
            part = self._buffer.get(key)
            if part is None and key in self._index:
                shard, start, end = self._index[key]
                if not shard.verified and _digest(shard.hidden, shard.keys, shard.offsets) != shard.checksum:
                    self._reject(shard.path, "its contents don't match its checksum")
                    return None
                shard.verified = True
                part = shard.hidden[start:end]
            if part is None or len(part) != count:
                self._index.pop(key, None)  # so that it can be written anew
                return None
            parts.append(part)
        return parts

    def _scan(self) -> None:
        """Take in the shards that are new in the folder: other processes' and the own."""
        try:
            changed = os.stat(self.folder).st_mtime_ns  # before the listing: what comes later changes it again
            if changed == self._seen:
                return
            names = {entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".safetensors")}
        except OSError:
            return
        # Two changes within one tick of the file system's clock look like one: a young mtime proves nothing.
        self._seen = changed if time.time_ns() - changed > _SETTLED_NS else 0
        for name in sorted(names - self._shards.keys() - self._ignored):
            path = self.folder / name
            try:
                shard = self._open(path)
            except FileNotFoundError:  # another process found it of no use
                continue
            except (OSError, RuntimeError) as error:  # no sign of damage (torch: a refused map): not deleted
                self._ignored.add(name)
                warnings.warn(f"the cached hidden states in {path} can't be read ({error}).", stacklevel=4)
                continue
            except (ValueError, TypeError, SafetensorError) as error:
                self._reject(path, str(error))
                continue
            self._shards[name] = shard
            keys, offsets = shard.keys.numpy().tobytes(), shard.offsets.tolist()
            for index, (start, end) in enumerate(itertools.pairwise(offsets)):
                self._index.setdefault(keys[16 * index : 16 * index + 16], (shard, start, end))

    def _open(self, path: Path) -> _Shard:
        size = path.stat().st_size
        with safe_open(path, framework="pt") as file:  # on the CPU its tensors are views of a memory map
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if tensors.keys() != {"hidden", "keys", "offsets"} or metadata.get("format") != FORMAT:
            raise ValueError(f"it is no shard of format {FORMAT} but holds {sorted(tensors)}")
        hidden, keys, offsets = tensors["hidden"], tensors["keys"], tensors["offsets"]
        if hidden.dtype != self.dtype or hidden.dim() != 2 or hidden.shape[1] != self.hidden_size:
            wanted = f"[rows, {self.hidden_size}] {self.dtype}"
            raise ValueError(f"it holds {list(hidden.shape)} {hidden.dtype} and not {wanted}")
        if keys.dtype != torch.uint8 or offsets.dtype != torch.int64 or keys.shape != (len(offsets) - 1, 16):
            raise ValueError(f"its keys {list(keys.shape)} don't match its offsets {list(offsets.shape)}")
        if offsets[0] != 0 or offsets[-1] != len(hidden) or bool((offsets.diff() <= 0).any()):
            raise ValueError("its offsets don't divide its rows")
        return _Shard(path, size, hidden, keys, offsets, metadata.get("checksum", ""))

    def _reject(self, path: Path, reason: str) -> None:
        self._ignored.add(path.name)
        self._shards.pop(path.name, None)
        self._index = {key: place for key, place in self._index.items() if place[0].path != path}
        try:
            path.unlink()
            deleted = "The file was deleted"
        except OSError as error:
            deleted = f"The file couldn't be deleted ({error}) and is ignored"
        warnings.warn(
            f"the cached hidden states in {path} are of no use: {reason}. {deleted}; what it held is computed again.",
            stacklevel=4,
        )

    def _put(self, name: str, data: bytes) -> None:
        """Write a file that is complete whenever it is seen, whatever kills this process or the machine."""
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _require_room(self, more: int) -> None:
        """OSError if the shards can't grow by ``more`` bytes."""
        total = self.stored_bytes - self._buffered + more
        if more and total + _SHARD_OVERHEAD > self.limit_bytes:
            raise OSError(f"{_size(total)} in all are over the limit of {_size(self.limit_bytes)}")
        free = shutil.disk_usage(self.folder).free
        if more and free - more < FREE_BYTES:
            raise OSError(
                f"{_size(more)} more would leave less than {_size(FREE_BYTES)} of the disk's {_size(free)} free"
            )

    def _stop(self, problem: OSError) -> None:
        if self.full:
            return
        self.full = True
        warnings.warn(
            f"the cache of the base's hidden states in {self.folder} stops growing: {problem}. What it holds stays in "
            "use, the rest runs uncached; the training itself is not affected.",
            stacklevel=4,
        )


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"
