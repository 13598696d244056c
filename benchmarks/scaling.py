"""What a step costs, on paper: operations, memory and network of LoRA training, with and without TMKL.

    python -m benchmarks.scaling                      # tables for 8B on 8 GPUs and 70B on 64; instant
    python -m benchmarks.scaling --check              # the same formulas against counts on this machine's CPU

The check counts what torch executes (products by its profiler; bytes that each rank receives in collectives), on a
model small enough for one core. Counts don't depend on how busy the machine is. docs/scaling.md explains the formulas.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ("plain", "tmkl", "tmkl, cached")
SHARDED = METHODS[:2]  # base="cached" writes nothing where weights are sharded: a rank's base pass is all ranks'


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama kind, with LoRA on all linear layers but the head."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    rank: int = 16

    @property
    def linear(self) -> list[tuple[int, int]]:
        """[inputs, outputs] of each linear layer of one block."""
        d, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(d, q), (d, kv), (d, kv), (q, d), (d, i), (d, i), (i, d)]

    @property
    def frozen(self) -> int:
        """Weights of the blocks' linear layers."""
        return self.layers * sum(a * b for a, b in self.linear)

    @property
    def trained(self) -> int:
        """Weights of the adapter."""
        return self.layers * sum(self.rank * (a + b) for a, b in self.linear)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights of the model without its adapter; norms, a millionth, left out."""
        return self.frozen + self.head * (1 if self.tied else 2)


SHAPES = {
    "SmolLM2 135M": Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "Llama 3 8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "Llama 3 70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}


# ---------------------------------------------------------------------------------------------------------- formulas


def operations(
    shape: Shape, method: str, sequences: int, length: int, supervised: int, *, checkpointing: bool = False
) -> float:
    """Of the products of one training step, a multiplication and an addition as two.

    Args:
        sequences, length: of the step, on one rank; attention is counted over all pairs of positions.
        supervised: positions with a target, and with ``context_weight`` those of the prompt as well. Plain training
            takes the logits of every position, as transformers does.
        checkpointing: the blocks' forward is run again in the backward.
    """
    tokens = sequences * length
    attention = 4 * tokens * length * shape.heads * shape.head_dim * shape.layers
    base = 2 * tokens * shape.frozen + attention
    forward = base + 2 * tokens * shape.trained
    # Of a frozen layer the gradient of its input alone, of the adapter and of attention both factors'.
    backward = 2 * tokens * shape.frozen + 2 * attention + 4 * tokens * shape.trained
    if not checkpointing:  # nobody asks for the gradient of the embeddings; checkpoints do, to have one to pass on
        backward -= 2 * tokens * sum(a * (b + shape.rank) for a, b in shape.linear[:3])
    body = forward * (2 if checkpointing else 1) + backward
    if method == "plain":
        return body + 4 * tokens * shape.head
    return body + 6 * supervised * shape.head + (base if method == "tmkl" else 0)


def received(shape: Shape, method: str, ranks: int, *, itemsize: int = 2) -> float:
    """Bytes that one rank receives in a step of FSDP2: the blocks once for each pass over them, forward and backward,
    with checkpointing or without.

    Each block is a unit, freed after each pass; embedding, head and norms are the root's, kept from the first pass to
    the end. Of the gradients, which are reduced in the weights' dtype, only the adapter's exist. The base's pass costs
    one block more: at the end of the backward, FSDP2 fetches the block that ran before the adapted model's first.
    """
    blocks, root = shape.frozen + shape.trained, shape.parameters - shape.frozen
    gathered = 2 * blocks + root
    if method == "tmkl":
        gathered += blocks + blocks / shape.layers
    return itemsize * (gathered + shape.trained) * (ranks - 1) / ranks


def reduced(shape: Shape, ranks: int) -> float:
    """Bytes that one rank receives in a step of DDP: the adapter's gradient in float32, summed in a ring."""
    return 2 * 4 * shape.trained * (ranks - 1) / ranks


def memory(shape: Shape, ranks: int, *, itemsize: int = 2) -> float:
    """Bytes of weights, adapter, its gradient and Adam's two states on one rank of FSDP (of DDP: ``ranks`` is 1), the
    last three in float32."""
    return (itemsize * shape.parameters + 16 * shape.trained) / ranks


def loss_memory(shape: Shape, supervised: int, *, chunk_bytes: int = 2**28) -> float:
    """Bytes that the loss adds to a step on a GPU: logits of both models for one chunk of rows, their gradient in
    place, and two hidden states and a gradient of each supervised position in bfloat16. It doesn't depend on V."""
    return 2 * min(chunk_bytes, 4 * supervised * shape.vocabulary) + 3 * 2 * supervised * shape.hidden


def break_even(shape: Shape, length: int, flops: float, *, itemsize: int = 2) -> float:
    """Bytes a second that a disk must give a GPU, so that reading the base's hidden states is faster than computing."""
    per_token = 2 * shape.frozen + 4 * length * shape.heads * shape.head_dim * shape.layers
    return itemsize * shape.hidden * flops / per_token


# ------------------------------------------------------------------------------------------------------------ tables


def tables(flops: float, network: float) -> None:
    """Print what each method costs beyond plain training. ``flops``, ``network``: of one GPU, in a second."""
    print(f"GPU: {flops / 1e12:g} TFLOP/s reached, {network / 1e9:g} GB/s received; 4 x 2,048 tokens a GPU, bfloat16")
    for name, ranks, form, methods in (("Llama 3 8B", 8, "DDP", METHODS), ("Llama 3 70B", 64, "FSDP2", SHARDED)):
        shape = SHAPES[name]
        held = memory(shape, 1 if form == "DDP" else ranks) / 2**30
        print(f"\n{name}, LoRA r {shape.rank}, {form} on {ranks} GPUs: {held:.1f} GiB of weights and states on each")
        print(f"{'':<16}{'supervised':>12}{'checkpointing':>15}{'PFLOP':>8}{'/ plain':>9}", end="")
        print(f"{'GB in':>8}{'s':>7}{'/ plain':>9}")
        for share in (1.0, 0.25):
            for checkpointing in (False, True):
                plain = (0.0, 0.0)
                for method in methods:
                    args = (shape, method, 4, 2048, int(4 * 2048 * share))
                    work = operations(*args, checkpointing=checkpointing)
                    wire = reduced(shape, ranks) if form == "DDP" else received(shape, method, ranks)
                    seconds = max(work / flops, wire / network)  # the network works while the GPU computes
                    plain = (work, seconds) if method == "plain" else plain
                    print(f"{method:<16}{share:>12.0%}{checkpointing!s:>15}{work / 1e15:>8.2f}", end="")
                    print(f"{work / plain[0]:>9.2f}{wire / 1e9:>8.1f}{seconds:>7.2f}{seconds / plain[1]:>9.2f}")
        print(f"loss: {loss_memory(shape, 4 * 2048) / 2**20:.0f} MiB; cache: {2 * shape.hidden} bytes a token", end="")
        print(f", worth reading from {break_even(shape, 2048, flops) / 1e6:.0f} MB/s a GPU on")


# ------------------------------------------------------------------------------------------------------------- check

TOY = Shape(layers=4, hidden=128, intermediate=384, heads=4, kv_heads=2, head_dim=32, vocabulary=4096, rank=8)


def toy(shape: Shape = TOY) -> Any:
    """The shape as a model of transformers with its adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        attn_implementation="eager",  # whose products the profiler counts
        use_cache=False,
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=shape.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def data(shape: Shape, sequences: int, length: int, supervised: int) -> dict[str, Tensor]:
    ids = torch.randint(shape.vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length - supervised // sequences] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def with_method(model: Any, method: str, batch: dict[str, Tensor], context_weight: float = 0.0) -> None:
    """Attach, and for the cache fill it, so that the next step is one that reads."""
    from mask_the_target import TMKL, attach

    if method == "plain":
        return
    options = TMKL(context_weight=context_weight)
    attach(model, options, base="cached" if method == "tmkl, cached" else "auto")
    model(**batch).loss.backward()
    model.zero_grad()


def counted_operations(
    method: str, sequences: int, length: int, supervised: int, *, checkpointing: bool, context_weight: float = 0.0
) -> float:
    """What torch's profiler counts in the products of one step."""
    from torch.profiler import ProfilerActivity, profile

    model = toy()
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    batch = data(TOY, sequences, length, supervised)
    with_method(model, method, batch, context_weight)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as found:
        model(**batch).loss.backward()
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    total = sum(event.flops for event in found.key_averages() if event.key in products)
    for event in found.key_averages(group_by_input_shape=True):  # the head's, which is oneDNN's own operator
        if "linear_pointwise" in event.key:
            (rows, inner), (outputs, _) = event.input_shapes[:2]
            total += 2 * rows * inner * outputs * event.count
    return float(total)


class Received(TorchDispatchMode):
    """Bytes that this rank receives in the gathers and reductions of FSDP2 within a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ranks, name = dist.get_world_size(), str(func)
        if "allgather" in name or "reduce_scatter" in name:
            whole = max(tensor.numel() * tensor.element_size() for tensor in args if isinstance(tensor, Tensor))
            self.bytes += whole * (ranks - 1) / ranks
        return func(*args, **(kwargs or {}))


def count_received() -> None:
    """In each of several processes: print each method's bytes on rank 0, counted and by the formula."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    batch = data(TOY, 2, 32, 32)
    for method in SHARDED:
        model = toy()
        with_method(model, method, batch)  # before it is sharded
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        with Received() as counted:
            model(**copy.deepcopy(batch)).loss.backward()
        if dist.get_rank() == 0:
            expected = received(TOY, method, dist.get_world_size(), itemsize=4)
            _line(f"{method}, {dist.get_world_size()} ranks: bytes received", counted.bytes, expected)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # taking the group down aborts now and then, on a busy machine


def _line(name: str, counted: float, expected: float) -> None:
    print(f"{name:<58}{counted:>14,.0f}{expected:>14,.0f}{counted / expected:>8.3f}", flush=True)


def check() -> None:
    """Counted against the formula, operations here and bytes in processes of their own."""
    import subprocess

    print(f"{'':<58}{'counted':>14}{'formula':>14}{'ratio':>8}", flush=True)
    for method in METHODS:
        for supervised in (252, 64):  # of 4 x 64; the first of a sequence is nobody's target
            for checkpointing in (False, True):
                sizes: Any = (method, 4, 64, supervised)
                counted = counted_operations(*sizes, checkpointing=checkpointing)
                expected = operations(TOY, *sizes, checkpointing=checkpointing)
                name = f"{method}, {supervised} of 256 supervised" + (", checkpointing" if checkpointing else "")
                _line(name + ": operations", counted, expected)
    for ranks in (2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "-m", "benchmarks.scaling", "--count-received"], env=environment, check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the formulas with counts, on the CPU")
    parser.add_argument("--flops", type=float, default=400e12, help="reached by a GPU; default %(default)g")
    parser.add_argument("--network", type=float, default=100e9, help="bytes/s that a GPU gets; default %(default)g")
    parser.add_argument("--count-received", action="store_true", help=argparse.SUPPRESS)  # in one of several processes
    args = parser.parse_args(argv)
    if args.count_received:
        count_received()
    elif args.check:
        check()
    else:
        tables(args.flops, args.network)


if __name__ == "__main__":
    main()
