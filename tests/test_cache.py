"""The cache on disk: one name for one base, one key for one content, and files that survive what happens to them."""

import copy
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file
from torch.testing._internal.two_tensor import TwoTensor

import mask_the_target
from conftest import toy_llama, with_lora
from mask_the_target.base import adapter_tensors
from mask_the_target.cache import GIB, SHARD_BYTES, CachedBase, HiddenStates, fingerprint, spans

D = 8


# --- the option ---


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"base": "model"}, "base='model'"),
        ({"limit_gib": 0.0}, "limit_gib=0.0"),
        ({"limit_gib": float("nan")}, "limit_gib=nan"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_a_wrong_option_is_refused_by_its_value(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CachedBase(**wrong)


def test_folder_is_the_users_own_then_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MTT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CachedBase().root == tmp_path / ".cache" / "mask-the-target"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert CachedBase().root == tmp_path / "xdg" / "mask-the-target"
    monkeypatch.setenv("MTT_CACHE", str(tmp_path / "mtt"))
    assert CachedBase().root == tmp_path / "mtt"
    assert CachedBase(folder="~/own").root == tmp_path / "own"


# --- the fingerprint ---


def base_name(model: torch.nn.Module, **extra: str) -> str:
    """Of the model with its adapter off: what the adapter trains is left out."""
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    without = {id(tensor) for tensor in adapter_tensors(inner)}
    return fingerprint(inner, without=without, **extra)[0]


@pytest.mark.parametrize(
    "adapter",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head", "norm"]}, {"trainable_token_indices": [3, 4]}],
    ids=str,
)
def test_fingerprint_is_the_same_under_any_adapter(adapter: dict) -> None:
    plain = toy_llama()
    name = base_name(plain)
    model = with_lora(toy_llama(), **adapter, moved=0.1)
    assert base_name(model) == name
    assert fingerprint(model.base_model.model)[0] != name  # the adapter's weights count unless they are left out
    weight = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight
    with torch.no_grad():
        weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(9.0))
    assert base_name(model) != name


def test_fingerprint_tells_models_apart_by_what_changes_their_hidden_states() -> None:
    model = toy_llama()
    name, description = fingerprint(model, autocast="none")
    assert len(name) == 32
    assert json.loads(json.dumps(description)) == description
    assert description["extra"] == {"autocast": "none"}
    assert fingerprint(toy_llama(), autocast="none")[0] == name
    assert fingerprint(model, autocast="bfloat16")[0] != name
    assert fingerprint(toy_llama(seed=1), autocast="none")[0] != name
    assert fingerprint(toy_llama(rms_norm_eps=1e-3), autocast="none")[0] != name
    assert fingerprint(toy_llama().to(torch.bfloat16), autocast="none")[0] != name
    eager = toy_llama()
    eager.set_attn_implementation("eager")
    assert fingerprint(eager, autocast="none")[0] != name
    model.register_buffer("scale", torch.ones(()))
    assert fingerprint(model, autocast="none")[0] != name

    same = toy_llama()
    same.config.use_cache, same.config._name_or_path = False, "elsewhere"
    assert fingerprint(same.eval(), autocast="none")[0] == name
    same.model.rotary_emb.inv_freq /= 4  # in no state_dict, and patched by hand all the same
    assert fingerprint(same, autocast="none")[0] != name


def test_fingerprint_of_tied_bfloat16_weights() -> None:
    model = toy_llama(tie_word_embeddings=True).to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    name = fingerprint(model)[0]
    assert fingerprint(copy.deepcopy(model))[0] == name
    assert base_name(with_lora(copy.deepcopy(model))) == name
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert fingerprint(model)[0] != name


def test_fingerprint_sees_every_part_of_a_tensor_made_of_tensors() -> None:
    def name(scale: float) -> str:
        module = torch.nn.Module()
        parts = TwoTensor(torch.arange(4.0), torch.full((4,), scale))
        module.weight = torch.nn.Parameter(parts, requires_grad=False)
        return fingerprint(module)[0]

    assert name(1.0) == name(1.0)
    assert name(1.0) != name(2.0)


def test_weights_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is sharded or not loaded"):
        fingerprint(toy_llama().to("meta"))


# --- spans ---


def naive_spans(ids: list, mask: list, positions: list, supervised: list, isolated: bool) -> list[tuple]:
    """(content, rows) of each document, token by token."""
    found, row_of = [], 0
    for row in range(len(ids)):
        documents: list[list[int]] = []
        previous = None
        for t, position in enumerate(positions[row]):
            if previous is None or position != previous + 1:
                documents.append([])
            documents[-1].append(t)
            previous = position
        for document in documents:
            targets = [t for t in document if supervised[row][t]]
            if not targets:
                continue
            visible = document if isolated else list(range(document[-1] + 1))
            kept = [t for t in visible if mask[row][t] or t in targets]
            inner = range(kept[0], kept[-1] + 1)
            content = (
                tuple((ids[row][t], positions[row][t]) for t in kept),
                tuple(bool(mask[row][t]) for t in inner),
                tuple(t - kept[0] for t in targets),
            )
            found.append((content, row_of, row_of + len(targets)))
            row_of += len(targets)
    return found


@st.composite
def batches(draw: st.DrawFn) -> tuple[list, list, list, list]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))

    def table(element: st.SearchStrategy) -> list:
        return draw(st.lists(st.lists(element, min_size=length, max_size=length), min_size=rows, max_size=rows))

    ids, mask = table(st.sampled_from([5, 6])), table(st.sampled_from([1, 1, 1, 0]))
    supervised = table(st.booleans())
    steps = table(st.sampled_from([1, 1, 1, None, 3]))
    positions = []
    for row in steps:
        places: list[int] = []
        for step in row:  # None starts anew at 0
            places.append(0 if not places or step is None else places[-1] + step)
        positions.append(places)
    return ids, mask, positions, supervised


def run_spans(ids: list, mask: list | None, positions: list | None, supervised: list, isolated: bool = True) -> list:
    return spans(
        torch.tensor(ids),
        None if mask is None else torch.tensor(mask),
        None if positions is None else torch.tensor(positions),
        torch.tensor(supervised).reshape(-1).nonzero().squeeze(1),
        isolated=isolated,
    )


@given(batches(), batches(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_keys_are_equal_exactly_where_contents_are(one: tuple, other: tuple, isolated: bool) -> None:
    found = run_spans(*one, isolated) + run_spans(*other, isolated)
    expected = naive_spans(*one, isolated) + naive_spans(*other, isolated)
    assert [(span.start, span.end) for span in found] == [place[1:] for place in expected]
    for a, (content_a, *_) in zip(found, expected, strict=True):
        for b, (content_b, *_) in zip(found, expected, strict=True):
            assert (a.key == b.key) == (content_a == content_b)


@given(batches(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_spans_cover_the_supervised_rows_in_order(batch: tuple, isolated: bool) -> None:
    found = run_spans(*batch, isolated)
    rows = [row for span in found for row in range(span.start, span.end)]
    assert rows == list(range(sum(map(sum, batch[3]))))
    assert all(len(span.key) == 16 and span.end > span.start for span in found)


@given(batches(), st.integers(1, 4), st.sampled_from([0, 1]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_right_padding_changes_no_key(batch: tuple, width: int, fill: int, isolated: bool) -> None:
    padded = [
        [[*row, *[value] * width] for row in table] for table, value in zip(batch, (9, 0, fill, False), strict=True)
    ]
    assert run_spans(*padded, isolated) == run_spans(*batch, isolated)


def test_a_document_has_the_same_key_alone_and_packed_only_if_isolated() -> None:
    alone = run_spans([[5, 6, 7]], [[1, 1, 1]], None, [[0, 1, 0]])[0].key
    packed = [[8, 9, 5, 6, 7]], None, [[0, 1, 0, 1, 2]], [[1, 0, 0, 1, 0]]
    other = [[8, 8, 5, 6, 7]], *packed[1:]
    assert run_spans(*packed, isolated=True)[1].key == alone
    assert run_spans(*other, isolated=True)[1].key == alone
    seen = [run_spans(*batch, isolated=False)[1].key for batch in (packed, other)]
    assert len({*seen, alone}) == 3
    numbered = packed[0], [[1, 1, 2, 2, 2]], *packed[2:]  # a mask that numbers the documents
    assert run_spans(*numbered, isolated=True)[1].key == alone
    assert run_spans(*numbered, isolated=False)[1].key not in seen


def test_left_padding_moves_positions_unless_they_are_given() -> None:
    plain = run_spans([[5, 6]], None, None, [[1, 1]])
    padded = [[0, 0, 5, 6]], [[0, 0, 1, 1]]
    assert run_spans(*padded, None, [[0, 0, 1, 1]])[0].key != plain[0].key
    for fill in (0, 1):
        assert run_spans(*padded, [[fill, fill, 0, 1]], [[0, 0, 1, 1]]) == plain


def test_key_is_the_documented_hash() -> None:
    # Lengths, ids, positions, mask relative to the first token (a hole is the least int64), supervised: little endian.
    numbers = [3, 3, 4, 2, 5, 6, 7, 0, 1, 3, 0, 0, -(2**63), 0, 0, 3]
    expected = blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=16).digest()
    assert run_spans([[5, 6, 9, 7, 9]], [[1, 1, 0, 1, 0]], None, [[1, 0, 0, 1, 0]])[0].key == expected


def test_other_shapes_are_refused() -> None:
    ids, supervised = torch.ones(2, 3, dtype=torch.long), torch.tensor([1])
    with pytest.raises(ValueError, match=r"position_ids \[3, 2, 3\] must have one number"):
        spans(ids, None, torch.ones(3, 2, 3, dtype=torch.long), supervised, isolated=False)
    with pytest.raises(ValueError, match=r"attention_mask \[2, 1, 3, 3\]"):
        spans(ids, torch.ones(2, 1, 3, 3), None, supervised, isolated=False)
    one_for_all = spans(ids, None, torch.arange(3)[None], supervised, isolated=False)
    assert one_for_all == spans(ids, None, None, supervised, isolated=False)


# --- the store ---


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def rows(number: int, count: int = 3, dtype: torch.dtype = torch.float32, width: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(count, width, generator=generator).to(dtype)


def store(folder: Path, dtype: torch.dtype = torch.float32, limit: int = GIB, width: int = D) -> HiddenStates:
    return HiddenStates(folder, {"model": "toy"}, width, dtype, limit)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**15), 2**15, (400, D, dtype.itemsize // 2), dtype=torch.int16)
    hidden = bits.view(dtype).reshape(400, D)  # every kind of number: zeros of both signs, infinities, NaNs
    own = store(tmp_path, dtype)
    assert own.read([key(0)], [150]) is None
    own.write(key(0), hidden[:150])
    theirs = hidden[150:].clone().requires_grad_()
    own.write(key(1), theirs)
    theirs.detach().zero_()  # written is written
    for reader in (own, None, None):
        if reader is None:
            own.flush()
            reader = store(tmp_path, dtype)
        read = reader.read([key(1), key(0)], [250, 150])
        assert read.dtype == dtype
        expected = torch.cat([hidden[150:], hidden[:150]])
        assert torch.equal(read.view(torch.int16), expected.view(torch.int16))
        read.zero_()  # the caller's own: what is stored stays
    assert (own.hits, own.misses) == (2, 1)
    assert own.stored_bytes == sum(path.stat().st_size for path in shards(tmp_path))
    assert json.loads((tmp_path / "base.json").read_text()) == {"model": "toy"}


def test_bfloat16_rounds_float32(tmp_path: Path) -> None:
    hidden = rows(0)
    own = store(tmp_path, torch.bfloat16)
    own.write(key(0), hidden)
    assert torch.equal(own.read([key(0)], [3]), hidden.bfloat16())


def test_all_or_nothing_and_nothing_twice(tmp_path: Path) -> None:
    own = store(tmp_path)
    own.write(key(0), rows(0))
    own.write(key(0), rows(9))
    own.flush()
    own.write(key(0), rows(9))
    own.flush()
    own.flush()
    assert len(shards(tmp_path)) == 1
    assert own.read([key(0), key(1)], [3, 3]) is None
    assert torch.equal(own.read([key(0)], [3]), rows(0))
    assert own.read([], []).shape == (0, D)
    assert (own.hits, own.misses) == (1, 2)
    with pytest.raises(ValueError, match=r"hidden states \[3, 9\] can't be stored as \[rows, 8\]"):
        own.write(key(2), torch.ones(3, 9))


def test_another_count_of_rows_is_a_miss_and_can_be_written_anew(tmp_path: Path) -> None:
    own = store(tmp_path)
    own.write(key(0), rows(0, 2))
    own.flush()
    assert own.read([key(0)], [3]) is None
    own.write(key(0), rows(0, 3))
    assert torch.equal(own.read([key(0)], [3]), rows(0, 3))


def test_what_is_big_is_flushed_and_read_through_a_memory_map(tmp_path: Path) -> None:
    width, hidden = 1024, torch.randn(SHARD_BYTES // 4096 // 2, 1024)  # half a shard
    own = store(tmp_path, width=width)
    own.write(key(0), hidden)
    assert not shards(tmp_path)
    own.write(key(1), hidden + 1)
    (shard,) = shards(tmp_path)
    assert torch.equal(own.read([key(1)], [len(hidden)]), hidden + 1)
    if sys.platform == "linux":
        assert str(shard) in Path("/proc/self/maps").read_text()


def change(path: Path, edit: Callable[[dict, dict], None]) -> None:
    """Rewrite a shard's tensors and metadata, with a checksum that is right where it was."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors, metadata)
    save_file(tensors, path, metadata)


def flip(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        change(path, lambda tensors, _: tensors[name].view(torch.uint8).reshape(-1)[5].bitwise_xor_(4))

    return damage


def edited(edit: Callable[[dict, dict], None]) -> Callable[[Path], None]:
    return lambda path: change(path, edit)


DAMAGES = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "."),
    "header torn": (lambda path: os.truncate(path, 20), "."),
    "empty": (lambda path: os.truncate(path, 0), "."),
    "no safetensors": (lambda path: path.write_bytes(bytes(range(256)) * 9), "."),
    "flipped hidden state": (flip("hidden"), "checksum"),
    "flipped key": (flip("keys"), "checksum"),
    "shifted offset": (edited(lambda t, _: t["offsets"][1].add_(1)), "checksum"),
    "offsets too long": (edited(lambda t, _: t["offsets"][-1].add_(1)), "offsets don't divide its rows"),
    "offsets not rising": (edited(lambda t, _: t["offsets"][1].zero_()), "offsets don't divide its rows"),
    "scalar offsets": (edited(lambda t, _: t.update(offsets=torch.tensor(6))), "."),
    "keys cut": (edited(lambda t, _: t.update(keys=t["keys"][:, :8].clone())), r"keys \[2, 8\]"),
    "another size": (edited(lambda t, _: t.update(hidden=t["hidden"][:, :4].clone())), r"\[6, 4\].*\[rows, 8\]"),
    "another dtype": (edited(lambda t, _: t.update(hidden=t["hidden"].double())), "float64 and not"),
    "no keys": (edited(lambda t, _: t.pop("keys")), r"holds \['hidden', 'offsets'\]"),
    "another format": (edited(lambda _, m: m.update(format="2")), "format 1"),
    "no checksum": (edited(lambda _, m: m.pop("checksum")), "checksum"),
}


def store_after_reading(folder: Path, wanted: bytes) -> HiddenStates:
    reader = store(folder)
    reader.read([wanted], [3])
    return reader


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_is_named_deleted_and_recomputed(tmp_path: Path, damage: str) -> None:
    writer = store(tmp_path)
    writer.write(key(5), rows(5))
    writer.flush()
    (good,) = shards(tmp_path)
    writer.write(key(0), rows(0))
    writer.write(key(1), rows(1))
    writer.flush()
    (bad,) = {*shards(tmp_path)} - {good}
    spoil, reason = DAMAGES[damage]
    spoil(bad)

    with pytest.warns(UserWarning, match=f"(?s){bad.name} are of no use: .*{reason}") as caught:
        reader = store_after_reading(tmp_path, key(1))
    assert len(caught) == 1
    assert reader.misses == 1
    assert not bad.exists()
    with quiet():
        assert reader.read([key(0)], [3]) is None
        reader.write(key(1), rows(1))
        reader.flush()
        for each in (reader, store(tmp_path)):
            assert torch.equal(each.read([key(5), key(1)], [3, 3]), torch.cat([rows(5), rows(1)]))


def test_stores_find_each_others_work(tmp_path: Path) -> None:
    one, other = store(tmp_path), store(tmp_path)
    for number in range(4):
        writer, reader = (one, other) if number % 2 else (other, one)
        assert reader.read([key(number)], [3]) is None
        then = tmp_path.stat().st_mtime_ns
        writer.write(key(number), rows(number))
        writer.flush()
        os.utime(tmp_path, ns=(then, then))  # a file system whose clock ticks slowly
        assert torch.equal(reader.read([key(number)], [3]), rows(number))


def test_what_cannot_be_opened_is_named_once_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.warns(UserWarning, match=r"a\.safetensors can't be read") as caught:
        own = store(tmp_path)
    assert len(caught) == 1
    with quiet():
        own.write(key(0), rows(0))
        own.flush()
        assert own.read([key(1)], [3]) is None
    assert (tmp_path / "a.safetensors").is_dir()


def test_the_limit_counts_whole_files(tmp_path: Path) -> None:
    own = store(tmp_path, limit=20_000)
    number = 0
    while not own.full:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is full
            own.write(key(number), rows(number, 1))  # 32 bytes, with 24 for its key and offset
        number += 1
    own.flush()
    assert 15_000 < sum(path.stat().st_size for path in shards(tmp_path)) <= 20_000


def test_the_limit_stops_growth_once_and_keeps_what_is_there(tmp_path: Path) -> None:
    limit = 40_000
    own = store(tmp_path, limit=limit)

    def write(start: int, stop: int) -> None:
        for number in range(start, stop):
            own.write(key(number), rows(number, 100))  # 3,200 bytes and a key

    with quiet():
        write(0, 10)
    with pytest.warns(UserWarning, match=r"stops growing: .* MiB in all are over the limit of 0\.0 MiB") as caught:
        write(10, 20)
    assert len(caught) == 1
    assert own.full
    with quiet():
        own.flush()
    stored = [number for number in range(20) if own.read([key(number)], [100]) is not None]
    assert stored == list(range(12))
    assert all(torch.equal(store(tmp_path).read([key(n)], [100]), rows(n, 100)) for n in stored)
    assert own.stored_bytes == sum(path.stat().st_size for path in shards(tmp_path)) <= limit


def test_what_others_wrote_counts_towards_the_limit(tmp_path: Path) -> None:
    one, other = store(tmp_path, limit=40_000), store(tmp_path, limit=40_000)
    for own, number in ((one, 0), (other, 1)):
        own.write(key(number), rows(number, 800))  # 25,600 bytes
    one.flush()
    with pytest.warns(UserWarning, match="over the limit"):
        other.flush()
    assert other.full
    assert len(shards(tmp_path)) == 1
    assert torch.equal(other.read([key(0)], [800]), rows(0, 800))


def test_a_disk_that_fills_up_stops_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = store(tmp_path)
    own.write(key(0), rows(0))
    own.flush()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=GIB + 10))
    with pytest.warns(UserWarning, match=r"would leave less than 1\.00 GiB of the disk's 1\.00 GiB free") as caught:
        own.write(key(1), rows(1))
    assert len(caught) == 1
    with quiet():
        own.write(key(2), rows(2))
    assert own.full
    assert own.read([key(1)], [3]) is None
    assert torch.equal(own.read([key(0)], [3]), rows(0))


def test_a_write_that_the_system_refuses_leaves_no_file(tmp_path: Path) -> None:
    own = store(tmp_path)
    own.write(key(0), rows(0, 1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # EFBIG in the middle of the file
    try:
        with pytest.warns(UserWarning, match="stops growing: .*File too large"):
            own.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert own.full
    assert [path.name for path in tmp_path.iterdir()] == ["base.json"]
    assert own.read([key(0)], [1000]) is None


def test_a_folder_that_vanishes_stops_growth(tmp_path: Path) -> None:
    own = store(tmp_path / "base")
    own.write(key(0), rows(0))
    shutil.rmtree(tmp_path / "base")
    with pytest.warns(UserWarning, match="stops growing: .*No such file"):
        own.flush()
    assert own.read([key(0)], [3]) is None


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"can't be written .*folder= or \$MTT_CACHE"):
        store(tmp_path / "file" / "base")


def test_the_size_is_announced_and_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = store(tmp_path, limit=2**21, width=1024)
    own.write(key(0), rows(0, 128, width=1024))  # half a MiB
    assert "256 tokens (1024 x torch.float32 each) take 1.0 MiB, of which 0.5 MiB are stored" in own.announce(256)
    with pytest.raises(
        ValueError, match=r"take 4\.0 MiB, .*4\.0 MiB in all are over the limit of 2\.0 MiB.*limit_gib="
    ):
        own.announce(1024)
    own.flush()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=GIB))
    own.announce(100)  # all there
    with pytest.raises(
        ValueError, match=r"0\.5 MiB more would leave less than 1\.00 GiB of the disk's 1\.00 GiB.*folder="
    ):
        own.announce(256)


def test_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / "a.tmp", tmp_path / "b.tmp"
    for path in (old, young):
        path.write_bytes(b"torn")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    with quiet():
        store(tmp_path)
    assert not old.exists()
    assert young.exists()


# --- several processes ---


def start(code: str, *arguments: object) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(mask_the_target.__file__).parents[1]), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


WRITER = """
import sys
from pathlib import Path
from conftest import toy_llama
from test_cache import fingerprint, key, rows, store
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
print(fingerprint(toy_llama(), stored="bfloat16")[0], flush=True)
sys.stdin.readline()
own = store(folder)
for number in [*range(20 * rank, 20 * rank + 20), 1000]:  # the last is everybody's
    own.write(key(number), rows(number))
    own.flush()
print("written", flush=True)
sys.stdin.readline()
print(sum(own.read([key(n)], [3]).equal(rows(n)) for n in [*range(40), 1000]), own.misses, flush=True)
"""


def test_processes_write_at_once_and_read_each_others_work(tmp_path: Path) -> None:
    writers = [start(WRITER, tmp_path, rank) for rank in range(2)]
    own, name = store(tmp_path), fingerprint(toy_llama(), stored="bfloat16")[0]
    for expected in (name, "written"):  # the fingerprint is the same in any process
        assert [writer.stdout.readline().strip() for writer in writers] == [expected] * 2
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
    assert [writer.communicate()[0].strip() for writer in writers] == ["41 0"] * 2
    assert [writer.returncode for writer in writers] == [0, 0]
    with quiet():
        for number in [*range(40), 1000]:
            assert torch.equal(own.read([key(number)], [3]), rows(number))
    assert not list(tmp_path.glob("*.tmp"))


KILLED = """
import sys
from pathlib import Path
import torch
from mask_the_target.cache import HiddenStates
own = HiddenStates(Path(sys.argv[1]), {}, 1024, torch.float32, 2**33)
for number in range(1000):
    own.write(number.to_bytes(16, "little"), torch.full((4000, 1024), float(number)))
    own.flush()
    print(number, flush=True)
"""


def test_a_kill_in_the_middle_of_writing_leaves_a_readable_store(tmp_path: Path) -> None:
    writer = start(KILLED, tmp_path)
    assert [writer.stdout.readline() for _ in range(3)] == ["0\n", "1\n", "2\n"]
    while not list(tmp_path.glob("*.tmp")):
        assert writer.poll() is None
    writer.send_signal(signal.SIGKILL)
    done = max([2, *map(int, writer.communicate()[0].split())])
    assert writer.returncode == -signal.SIGKILL
    with quiet():
        reader = store(tmp_path, width=1024)
        for number in range(done + 1):
            assert (reader.read([key(number)], [4000]) == number).all()
