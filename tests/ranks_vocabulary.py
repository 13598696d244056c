"""A head whose vocabulary is sharded (tensor parallelism) against one process: run by test_ranks.py, and by hand with

PYTHONPATH=src:tests torchrun --nproc_per_node 2 tests/ranks_vocabulary.py
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from conftest import batch, toy_llama, with_lora
from mask_the_target import TMKL, TMKLCallback, attach, linear, linear_target_masked_kl, target_masked_kl
from mask_the_target.head import Head, LogitTransform
from options import ALL_OPTIONS, name
from ranks import LEARNING_RATE, OPTIONS, leave, refused, whole
from ranks_trainer import rows
from reference import reference_loss

TRANSFORM = LogitTransform(0.5, 3.0)
CONTEXT = [TMKL(weight=0.7, context_weight=0.3)]
VOCABULARY, ROWS, WIDTH = 13, 19, 4  # parts of 7 and 6, or of 5, 5 and 3


class Widest(TorchDispatchMode):
    """The largest last dimension of all tensors that operators give, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 0

    def __enter__(self) -> Any:
        self._stack = ExitStack()
        self._stack.enter_context(torch.no_grad())
        # An operator's inside isn't dispatched.
        self._stack.enter_context(mock.patch.object(linear, "_linear_rows", linear._linear_rows._init_fn))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.dim() > 1:
                self.width = max(self.width, leaf.shape[-1])
        return output


def inputs(context: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[torch.rand(ROWS, generator=generator) < 0.3] = -1 if context else -100
    hidden = normal(ROWS, WIDTH)
    found = {"hidden": hidden, "base_hidden": hidden + 0.5 * normal(ROWS, WIDTH), "labels": labels}
    return found | {"head_weight": normal(VOCABULARY, WIDTH), "head_bias": normal(VOCABULARY)}


def functional(options: TMKL, mesh: DeviceMesh, *, own_base_head: bool) -> dict[str, float]:
    """The largest differences to the dense definition: of the terms, of both gradients; and what was widest."""
    x = inputs(options.context_weight > 0)
    weight, bias, hidden = x["head_weight"].requires_grad_(), x["head_bias"], x["hidden"].requires_grad_()
    other = weight.detach().roll(1, 0) if own_base_head else weight.detach()
    cut = TRANSFORM(hidden @ weight.t() + bias), TRANSFORM(x["base_hidden"] @ other.t() + bias)
    expected = target_masked_kl(*cut, x["labels"], options)
    wanted = torch.autograd.grad(expected.loss, [hidden, weight])

    parts = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(bias, mesh, [Shard(0)])
    base_head = Head(distribute_tensor(other, mesh, [Shard(0)]), bias, TRANSFORM) if own_base_head else None
    arguments = (hidden, x["base_hidden"], parts, x["labels"], options)
    heads: Any = {"head_bias": bias, "logit_transform": TRANSFORM, "base_head": base_head}
    result = linear_target_masked_kl(*arguments, **heads, chunk_tokens=4)
    with Widest() as widest:
        linear_target_masked_kl(*arguments, **heads)
    found = torch.autograd.grad(result.loss, [hidden, parts])
    terms = [float((getattr(result, n) - getattr(expected, n)).abs()) for n in ("loss", "ce", "kl", "context_kl")]
    gradients = [float((whole(a) - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return {"terms": max(terms), "gradients": max(gradients), "width": widest.width}


def from_folder(folder: str) -> Any:
    """The model as transformers shards it."""
    from transformers.distributed import DistributedConfig  # not in the oldest transformers

    config = DistributedConfig(tp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def with_column_lora(model: Any, **lora: Any) -> Any:
    """PEFT 0.21's LoRA on row-wise layers (o_proj, down_proj) of sharded models fails in its own forward."""
    return with_lora(model, target_modules=["q_proj", "v_proj", "gate_proj"], **lora)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_adapter_of(start: nn.Module, shard: Callable[[], Any], **lora: Any) -> nn.Module:
    """The sharded model with the adapter that ``start`` has."""
    model = with_column_lora(shard(), **lora)
    with torch.no_grad():
        for mine, its in zip(trainable(model), trainable(start), strict=True):
            mesh, placements = getattr(mine, "device_mesh", None), getattr(mine, "placements", None)
            mine.copy_(its if mesh is None else distribute_tensor(its.detach(), mesh, placements))
    return model


def trained(model: nn.Module, folder: str) -> list[dict[str, float]]:
    """What transformers' Trainer logs in two steps, where ranks that share a batch must not count it twice."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=6,
        use_cpu=True,
        learning_rate=0.02,
        max_grad_norm=0.0,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if dist.is_initialized():  # accelerate shards on accelerators alone
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = TMKLCallback(TMKL(weight=0.5, context_weight=5.0))
    run = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[callback])
    run.train()
    figures = ("loss", "ce", "kl", "context_kl")
    return [{name: entry[name] for name in figures} for entry in run.state.log_history if "loss" in entry]


def first_step(base: Any, shard: Callable[[], Any], data: dict[str, Tensor], choice: Any, **lora: Any) -> Any:
    """A step of SGD of the sharded model, and one process's."""
    start = with_column_lora(copy.deepcopy(base), moved=0.2, **lora)
    model = with_adapter_of(start, shard, **lora)
    attachment = attach(model, OPTIONS, base=choice)
    optimizer = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    with Widest() as widest:
        model(**data)
    loss = model(**data).loss
    loss.backward()
    optimizer.step()

    expected = reference_loss(start, base, data, OPTIONS)
    expected.loss.backward()
    before = [parameter.detach().clone() for parameter in trainable(start)]
    torch.optim.SGD(trainable(start), lr=LEARNING_RATE).step()
    last = attachment.last
    assert last is not None
    return {
        "loss": float(loss.detach()),
        "expected": float(expected.loss.detach()),
        "kl": float(last.kl),
        "expected kl": float(expected.kl.detach()),
        "moved": largest_difference(before, trainable(start)),
        "error": largest_difference([whole(parameter) for parameter in trainable(model)], trainable(start)),
        "width": widest.width,
    }


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {
        f"{name(options)}{', context' if options.context_weight else ''}{', own base head' if own else ''}": functional(
            options, mesh, own_base_head=own
        )
        for options, own in itertools.product(ALL_OPTIONS + CONTEXT, (False, True))
    }
    whole_head = distribute_tensor(torch.zeros(8, WIDTH), mesh, [Replicate()])
    few = distribute_tensor(torch.zeros(4, WIDTH), mesh, [Shard(0)])
    rows, labels = torch.zeros(2, WIDTH), torch.zeros(2, dtype=torch.int64)
    messages = {
        "placements": refused(lambda: linear_target_masked_kl(rows, rows, whole_head, labels)),
        "few tokens": refused(lambda: linear_target_masked_kl(rows, rows, few, labels)),
    }
    models, steps = {}, []
    if dist.get_world_size() == 2:  # the toy has two heads of keys and values
        base = toy_llama(vocab_size=96)
        with tempfile.TemporaryDirectory() as made:
            shared = [made]
            dist.broadcast_object_list(shared)
            base.save_pretrained(shared[0])  # transformers lets the first rank write
            dist.barrier()
            models, said = of_models(base, lambda: from_folder(shared[0]), mesh)
            start = with_column_lora(toy_llama(vocab_size=96), moved=0.2)
            steps = trained(with_adapter_of(start, lambda: from_folder(shared[0])), shared[0])
        messages |= said
    if dist.get_rank() == 0:
        print("MESSAGES " + json.dumps(messages))
        print("FUNCTIONAL " + json.dumps(found))
        print("MODELS " + json.dumps(models))
        print("STEPS " + json.dumps(steps))
    leave()


def of_models(base: Any, shard: Callable[[], Any], mesh: DeviceMesh) -> tuple[dict[str, Any], dict[str, str]]:
    """First steps, and what is said where there is none."""
    step = functools.partial(first_step, base, shard, batch(rows=6, length=12, vocabulary=96))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached = step("cached")
    found = {
        "lora": step("auto"),
        "shared layer": step("auto", layers_to_transform=[1]),
        "separate base": step(shard()),
        "cached base": cached,
    }
    model = with_column_lora(copy.deepcopy(base))
    plan = {"base_model.model.lm_head": ColwiseParallel(output_layouts=Replicate())}
    messages = {
        "torch's own": refused(lambda: attach(parallelize_module(model, mesh, plan), OPTIONS)),
        "cached base": " ".join(str(warning.message) for warning in caught),
        "whole base": refused(lambda: step(copy.deepcopy(base))),
        "initial adapter": refused(lambda: step("initial")),
        "saved head": refused(lambda: attach(with_column_lora(shard(), modules_to_save=["lm_head"]), OPTIONS)),
    }
    return found, messages


if __name__ == "__main__":
    main()
