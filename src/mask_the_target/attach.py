"""The one mechanism: the inner causal LM's forward, on the instance.

In training, with labels, the forward runs the base (no gradient, adapter off, dropout off), then the adapted model,
and returns CE + weight * TMKL as its ``loss``. Everything happens inside that forward, so any trainer that calls
``model(**batch).loss`` trains with it. In eval mode and without labels the model's own forward answers.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask_the_target.base import (
    Base,
    BaseChoice,
    BaseWeights,
    adapter_parameters,
    first_of,
    require_pass_through,
    resolve_base,
)
from mask_the_target.base_cache import BaseCache
from mask_the_target.cache import CachedBase
from mask_the_target.context import context_mask, placeholders_of, sample
from mask_the_target.head import (
    FORWARD_SETTINGS,
    Head,
    HeadTap,
    Probed,
    accepted,
    evaluating,
    narrow,
    probe,
    probe_inputs,
    text_config,
)
from mask_the_target.integrations import trl
from mask_the_target.linear import linear_rows
from mask_the_target.objective import (
    CONTEXT_INDEX,
    IGNORE_INDEX,
    TMKL,
    check_labels,
    context_denominator,
    denominator,
)
from mask_the_target.prefix import SharedPrefix, find_shared_prefix
from mask_the_target.rows_torch import Rows
from mask_the_target.sharding import (
    from_first_process,
    gathering,
    is_distributed,
    is_sharded,
    loaded_by_first_process,
    whole_shape,
)


@dataclass(frozen=True)
class Step:
    """One training forward's numbers: scalars on the model's device, detached. ``loss = ce + weight * kl`` (+ aux).

    ``ce``, ``kl`` and ``full_kl`` (None unless asked for) are sums over the supervised positions in nats, over the
    step's denominator: ``num_items_in_batch`` when the trainer gave it, else the supervised positions. ``supervised``
    and ``excluded`` count positions of this forward. ``context_kl`` is the sum over this forward's context positions,
    over the step's number of them (``context``: this forward's); with it, ``loss`` has
    ``context_weight * context_kl`` more.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    full_kl: Tensor | None
    supervised: Tensor
    excluded: Tensor
    context_kl: Tensor
    context: Tensor


@dataclass
class Totals:
    """Sums since the last reset, kept on the device so that no step waits for the host."""

    forwards: int = 0
    ce: Tensor | float = 0.0  # nats, not normalised
    kl: Tensor | float = 0.0  # nats, not normalised
    full_kl: Tensor | float = 0.0  # nats, not normalised
    supervised: Tensor | float = 0.0
    excluded: Tensor | float = 0.0
    context_kl: Tensor | float = 0.0  # nats, not normalised
    context: Tensor | float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Totals)))


@dataclass(frozen=True)
class _Positions:
    """Those that the loss is made of: indices into the flattened ``[B * T]``."""

    supervised: Tensor  # [n], sorted
    context: Tensor  # [m] of this forward's context positions, sorted: all, or a sample of them
    all_context: int  # how many there are
    kept: Tensor  # sorted, both: where the base's hidden states are needed. A cache keeps all context positions.

    def of(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """The rows of ``hidden``, one for each of ``kept``, at ``wanted``."""
        return hidden if wanted is self.kept else hidden[torch.searchsorted(self.kept, wanted).to(hidden.device)]


@dataclass
class _Adapted:
    """What the adapted pass left behind at the head."""

    rows: Rows  # of the supervised positions
    context: Rows | None  # of the context positions
    positions: Tensor  # indices into the flattened [B * T] of the rows, then of the context


@dataclass
class Attachment:
    """A model that trains with TMKL until :meth:`detach`; also a context manager. Made by :func:`attach`.

    Attributes:
        model: the inner causal LM whose forward was replaced.
        options: the objective.
        base: where the base distribution comes from.
        last: the last training forward's numbers, or None before the first.
        full_kl: also measure the full-vocabulary KL at each step (a little more time, no more memory).
        cache: answers base passes from disk, or None.
        context_weight: of the options; may be set to another between steps, where theirs is above 0.
        prefix: the layers before the first adapter, which run once for both passes; None where there are none.
        totals: sums over training forwards; replace it by ``Totals()`` to start anew.
    """

    model: nn.Module
    options: TMKL
    base: Base
    full_kl: bool = False
    cache: BaseCache | None = None
    last: Step | None = None
    totals: Totals = field(default_factory=Totals)
    # Set by integrations: compute logits too, for trainers that read them; raise, not warn, where a training forward
    # goes without TMKL; called in each backward with each position's loss and the factor that it is backpropagated
    # with, [n] both; the step's denominators (supervised and context positions), where they are known before it.
    keep_logits: bool = False
    strict: bool = False
    step_counts: tuple[Any, Any] | None = None
    # Also by integrations: called before each forward. It may detach, once what they attached for has ended.
    before_forward: Callable[[], None] | None = None
    on_backward: Callable[[Tensor, Tensor], None] | None = None

    def __post_init__(self) -> None:
        self._tap = HeadTap(self.model)
        try:
            weight = self._tap.head().weight
            if self._tap.adapted and is_distributed(weight):
                raise ValueError(
                    "the head has an adapter or a trained copy, and its weight is sharded already, by its vocabulary "
                    "(tensor parallelism) or because FSDP2 wrapped the model first; only the base's head may be. Leave "
                    "the head out of the adapter, or attach before FSDP2 wraps the model."
                )
            self._vocabulary = whole_shape(weight)[0]
            self._previous = self.model.forward
            self._own = self.model.__dict__.get("forward")
            self._probed = from_first_process(self.model, lambda: probe(self.model, self._previous, self._tap))
            self._base_tap, self._base_probed = self._probe_base()
            if not self.shifts_labels:
                warnings.warn(
                    f"{type(self.model).__name__} compares its logits with the labels of the same position, so TMKL "
                    "does too: give it labels that are shifted already, or it learns to repeat its input.",
                    stacklevel=4,
                )
        except BaseException:
            self._tap.remove()
            raise
        # A cache's base passes are not each the same batch's as the adapted pass that follows.
        shareable = self.base.model is self.model and self.cache is None
        # Where weights come together layer by layer, layers keep the hooks that do it, and are never skipped.
        shareable &= not (is_sharded(self.model) or loaded_by_first_process())
        self.prefix = find_shared_prefix(self.model, self._probe_hidden) if shareable else None
        self._active = True
        # Weakly, since a wrapper that shards the model replaces them, and would not be rid of the whole ones.
        self._frozen: list[weakref.ref[nn.Parameter]] = []
        if self.base.model is self.model:
            own = {id(p) for p in adapter_parameters(self.model)}
            others = [p for p in self.model.parameters() if id(p) not in own]
            self._frozen = [weakref.ref(p) for p in others if not p.requires_grad]
        self._base_weights = BaseWeights(self.base.model)
        self._warned: set[str] = set()
        self._running = False
        self.context_weight: float = self.options.context_weight
        self._placeholders = placeholders_of(self.model) if self.options.context_weight else ()
        self._first_batch = True
        # Of its own, so that a sample of context positions moves no random number of the training.
        self._sampler = torch.Generator().manual_seed(torch.initial_seed())
        backbone = getattr(self.model, "base_model", None)
        self._guard = None
        if isinstance(backbone, nn.Module) and backbone is not self.model:
            self._guard = backbone.register_forward_pre_hook(self._notice_bypass)
        self._token_statistics = trl.reads_token_statistics(self._previous)
        signature = inspect.signature(self._previous)
        self._names = list(signature.parameters)
        self._settings = {name: value for name, value in FORWARD_SETTINGS.items() if accepted(self._previous, name)}
        attachment = self

        # The signature stays the model's own: trainers drop columns, and `generate` refuses arguments, by it.
        @functools.wraps(self._previous)
        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return attachment._forward(model, *args, **kwargs)

        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)  # binding takes it away again
        signature = signature.replace(parameters=[first, *signature.parameters.values()])
        forward.__dict__["__signature__"] = signature
        self._forward_method = types.MethodType(forward, self.model)
        self.model.forward = self._forward_method
        _ATTACHED[id(self.model)] = self

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def installed(self) -> bool:
        """Whether the model's forward is still ours, and not replaced or wrapped by another tool since."""
        return self._active and self.model.__dict__.get("forward") is self._forward_method

    @property
    def has_aux_loss(self) -> bool:
        """Whether the model adds a router's auxiliary loss (mixture of experts) to its loss."""
        return self._probed.aux_coefficient != 0

    @property
    def shifts_labels(self) -> bool:
        """Whether the model's own loss compares the logits at t with the label at t + 1, and not with the one at t."""
        return self._probed.shifts_labels

    def detach(self) -> None:
        """Give the model its own forward and head back. Calling it twice is harmless."""
        if not self._active:
            return
        if self.cache is not None:
            self.cache.flush()
        if not self.installed:
            warnings.warn(
                "another tool wrapped this model's forward after TMKL was attached, so the wrapper stays in place; "
                "TMKL's part of it is off.",
                stacklevel=2,
            )
        elif self._own is None:
            del self.model.forward
        else:
            self.model.forward = self._own
        self._active = False
        if self._guard is not None:
            self._guard.remove()
        self._tap.remove()
        if self._base_tap is not self._tap:
            self._base_tap.remove()
        self.check_base()  # last: it asks the device, which may be what has failed

    def check_base(self) -> None:
        """Warn, once, if the base's weights have been written over since attaching.

        It waits for the device, and takes 8 ms for SmolLM2-135M (a core that was busy with other work).
        """
        if "base" in self._warned or not (changed := self._base_weights.changed()):
            return
        self._warned.add("base")
        warnings.warn(
            f"{len(changed)} weights of the base have changed since TMKL was attached ({first_of(list(changed))}; by "
            f"up to {max(changed.values()):.1%}): an adapter was merged by hand (as ReLoRA does), or a checkpoint "
            "loaded over them. Since then the KL has been to another model than the base. Leave these weights alone, "
            "or pass a separately loaded model as base=.",
            stacklevel=3,
        )

    def _probe_hidden(self) -> Tensor:
        """The hidden states that reach the head on a few tokens, ``[B, T, d]``, by the model's own forward."""
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return narrow(hidden)

        inputs = probe_inputs(self.model, self._previous, self._vocabulary)
        self._tap.run(self._previous, inputs, keep)
        return seen[0]

    def _probe_base(self) -> tuple[HeadTap, Probed]:
        if self.base.model is self.model:
            if self.base.kind == "initial":
                with self.base.context():  # refused now, not in the first step, where the model is sharded already
                    pass
            if self.base.kind == "off":
                inputs = probe_inputs(self.model, self._previous, self._vocabulary)
                run = functools.partial(self._previous, **inputs)
                with torch.no_grad(), evaluating(self.model), self.base.context():
                    from_first_process(self.model, lambda: require_pass_through(self.model, run))
            return self._tap, self._probed
        if loaded_by_first_process():
            raise ValueError(
                "base= may be loaded on the first process alone (FSDP's cpu_ram_efficient_loading), and nothing gives "
                "its weights to the others, which would be held to an empty model. Turn cpu_ram_efficient_loading off."
            )
        tap = HeadTap(self.base.model)
        try:
            own, other = self._vocabulary, whole_shape(tap.head().weight)[0]
            if own != other:
                raise ValueError(
                    f"the model has {own} tokens and base= has {other}; they must share one "
                    "vocabulary to be compared token by token."
                )
            return tap, probe(self.base.model, self.base.model.forward, tap)
        except BaseException:
            tap.remove()
            raise

    def _forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model is not self.model:
            raise RuntimeError(
                "this is a copy of a model that TMKL was attached to, and it would run the original's weights. Detach "
                "before copying, and attach to the copy."
            )
        if self.before_forward is not None and not torch.compiler.is_compiling():
            self.before_forward()
        if not self._active:
            return self._previous(*args, **kwargs)
        self._running = True
        try:
            kwargs.update(zip(self._names, args, strict=False))
            unlabelled = kwargs.get("labels") is None and kwargs.get("shift_labels") is None
            if not model.training:
                if not unlabelled:
                    self._inactive(
                        "a forward with labels and gradients ran in eval mode, where the loss is plain cross-entropy "
                        "without TMKL. To train, call model.train() first (from_pretrained gives a model in eval mode, "
                        "and Lightning keeps it); to evaluate, use torch.no_grad()."
                    )
                return self._previous(**kwargs)
            if unlabelled:
                self._inactive(
                    "a training forward came without labels, so TMKL is not in its loss. Something upstream takes the "
                    "labels out (label_smoothing_factor, compute_loss_func, a loss that is computed from logits): turn "
                    "it off."
                )
                return self._previous(**kwargs)
            return self._train(kwargs)
        finally:
            self._running = False

    def _notice_bypass(self, backbone: nn.Module, inputs: Any) -> None:
        if backbone.training and not self._running:
            self._inactive(
                "the backbone ran in training outside of TMKL's forward, so TMKL is not in that loss. Something that "
                "was built after attaching computes the loss from the backbone itself: attach after the trainer is "
                "built, or use TMKLCallback."
            )

    def _inactive(self, message: str) -> None:
        if not torch.is_grad_enabled():
            return
        if self.strict:
            raise RuntimeError(message)
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def _check_step(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse what changed since attaching, or is given now, and would put another model in the base's place."""
        for name in ("past_key_values", "cache"):
            if not isinstance(kwargs.get(name), (bool, type(None))):
                raise ValueError(
                    f"a training forward was given {name}, the adapted model's keys and values of earlier tokens, "
                    "which the base's pass would read and add to. Train on whole sequences."
                )
        if self.context_weight and not self.options.context_weight:
            raise RuntimeError(
                f"context_weight was set to {self.context_weight}, and the model was attached without any: attach "
                "with TMKL(context_weight=...) above 0, and change it from there."
            )
        if torch.compiler.is_compiling():
            return
        # 0.3 ms for the 272 weights of SmolLM2-135M, on a core that was busy with other work.
        thawed = {id(p) for reference in self._frozen if (p := reference()) is not None and p.requires_grad}
        if thawed:
            names = [name for name, p in self.model.named_parameters() if id(p) in thawed]
            raise RuntimeError(
                f"{len(thawed)} weights outside the adapter were frozen when TMKL was attached and are trainable now "
                f"({first_of(names)}): once they move, the base moves with them. Keep them frozen, or pass "
                "a separate frozen model as base=."
            )

    def _train(self, kwargs: dict[str, Any]) -> Any:
        self._check_step(kwargs)
        shifted = kwargs.get("shift_labels") is not None
        fused = trl.take_loss_arguments(kwargs, self._names)
        # Who asks for TRL's fused results shifts the labels itself, whatever the model's own loss does.
        shift = fused or self.shifts_labels
        targets = _take_targets(kwargs, shift=shift)
        num_items, num_context = kwargs.pop("num_items_in_batch", None), kwargs.pop("num_context_in_batch", None)
        as_tuple = kwargs.pop("return_dict", None) is False
        kwargs |= self._settings
        if targets.device.type == "cpu":  # elsewhere the check would wait for the device
            check_labels(targets.reshape(-1), vocabulary=self._vocabulary)
        # A trainer that gives no count averages over its batches itself; but TRL's fused one divides by it afterwards.
        if num_context is None and self.step_counts is not None and (fused or num_items is not None):
            num_items, num_context = self.step_counts
        positions = self._positions(kwargs, targets, num_items, num_context, shift=shift)

        base_hidden, base_head = self._base_pass(kwargs, positions.kept)
        output, adapted = self._adapted_pass(
            kwargs, targets, positions, base_hidden, base_head, token_statistics=fused or self._token_statistics
        )
        del base_hidden
        rows, context = adapted.rows, adapted.context
        device = rows.loss.device
        count, context_count = (
            torch.tensor(n, device=device) for n in (len(positions.supervised), positions.all_context)
        )
        items, context_items = denominator(num_items, count), context_denominator(num_context, context_count)
        losses = rows.loss  # summed and divided by items, they are the loss
        if context is not None:
            share = positions.all_context / max(1, len(positions.context))  # what each one of a sample stands for
            losses = torch.cat([losses, context.loss * (self.context_weight * share * items / context_items)])
        if self.on_backward is not None and losses.requires_grad:
            losses.register_hook(functools.partial(self.on_backward, losses.detach()))
        if isinstance(shown := output.get("logits"), Tensor) and shown.requires_grad:
            losses = _Before.apply(losses, shown)
        loss = losses.sum() / items
        aux = output.get("aux_loss")
        if isinstance(aux, Tensor):
            loss = loss + self._probed.aux_coefficient * aux.to(loss.device)
        context_kl = loss.new_zeros(()) if context is None else context.kl.sum() * share
        self._record(rows, loss, items, count, context_kl, context_items, context_count)
        if fused:
            return trl.fused_output(rows, losses, adapted.positions, targets, loss, aux, shifted=shifted)
        fields = {**output, "loss": loss}
        if not self.keep_logits:
            fields["logits"] = None
        output = type(output)(**fields)
        if self._token_statistics:
            trl.add_token_statistics(output, rows, count)
        return output.to_tuple() if as_tuple else output

    def count_context(self, batch: Mapping[str, Any]) -> int:
        """How many context positions a training batch has."""
        inputs = dict(batch)
        targets = _take_targets(inputs, shift=self.shifts_labels)
        return int(context_mask(inputs, targets, self._placeholders, shifted=self.shifts_labels).sum())

    def _positions(
        self, kwargs: dict[str, Any], targets: Tensor, num_items: Any = None, num_context: Any = None, *, shift: bool
    ) -> _Positions:
        """The positions that count. ``num_items`` and ``num_context`` are those of the whole step, where known."""
        supervised = _supervised(targets)
        if not self.options.context_weight:
            return _Positions(supervised, supervised[:0], 0, supervised)
        if num_items is not None and num_context is None:
            raise ValueError(
                "num_items_in_batch came without num_context_in_batch, the number of context positions of the same "
                "batches: context_weight has a denominator of its own. Count them with "
                "mask_the_target.count_context(model, batch), or pass neither."
            )
        every = context_mask(kwargs, targets, self._placeholders, shifted=shift).reshape(-1).nonzero().squeeze(1)
        if self._first_batch and not len(every):
            warnings.warn(
                "the first batch has no context position (a prompt's, without a label), so context_weight holds "
                "nothing in it. It needs data with prompts whose labels are -100, as completion_only_loss makes them, "
                "or anchors: TMKLCallback(..., anchors='auto'), mtt train --anchors auto.",
                stacklevel=2,
            )
        self._first_batch = False
        of = len(every) if num_context is None else num_context
        context = sample(every, self.options.context_tokens, of, self._sampler)
        kept = torch.cat([supervised, every if self.cache is not None else context]).sort().values
        return _Positions(supervised, context, len(every), kept)

    def _base_pass(self, kwargs: dict[str, Any], kept: Tensor) -> tuple[Tensor, Head | None]:
        """The base's final hidden states at the positions ``kept``, ``[n, d]``; and its head, where it has its own.

        It runs first: its activations are gone before the adapted graph is built.
        """
        model, tap = self.base.model, self._base_tap
        forward = self._previous if model is self.model else model.forward
        inputs = dict(kwargs)
        if hasattr(text_config(model), "output_router_logits") and accepted(forward, "output_router_logits"):
            inputs["output_router_logits"] = False  # the router's loss is the adapted pass's alone

        def compute(inputs: Mapping[str, Any]) -> Tensor:
            seen: list[Tensor] = []

            def keep(hidden: Tensor) -> Tensor:
                seen.append(hidden.flatten(0, -2)[kept.to(hidden.device)])
                return narrow(hidden)

            prefix = self._shared()
            recording = nullcontext() if prefix is None else prefix.recording()
            with torch.no_grad(), evaluating(model), self.base.context(), recording:
                tap.run(forward, inputs, keep)
            return seen[0]

        hidden = compute(inputs) if self.cache is None else self.cache.hidden(inputs, kept, compute)
        return hidden, None if model is self.model else tap.head(self._base_probed.transform)

    def _shared(self) -> SharedPrefix | None:
        """None under compilation, where there is no batch yet."""
        return None if torch.compiler.is_compiling() else self.prefix

    def fill_cache(self, batch: Mapping[str, Any]) -> None:
        """Run (or find) the base pass of a training batch, so that its hidden states are in the cache.

        Raises ValueError without a cache, and where this process hasn't the whole weights.
        """
        if self.cache is None:
            raise ValueError("this model is attached without a cache; use attach(model, base='cached').")
        if is_sharded(self.base.model) or loaded_by_first_process():
            raise ValueError(
                "the cache is filled by whole weights, and this model is sharded (FSDP, ZeRO-3), or loaded on the "
                "first process alone (FSDP's cpu_ram_efficient_loading). Turn that off, and fill the cache before the "
                "model is wrapped."
            )
        inputs = {**batch, **self._settings}
        shift = self.shifts_labels
        targets = _take_targets(inputs, shift=shift)
        self._running = True
        try:
            self._base_pass(inputs, self._positions(inputs, targets, shift=shift).kept)
        finally:
            self._running = False

    def _adapted_pass(
        self,
        kwargs: dict[str, Any],
        targets: Tensor,
        positions: _Positions,
        base_hidden: Tensor,
        base_head: Head | None,
        token_statistics: bool,
    ) -> tuple[Any, _Adapted]:
        left: list[_Adapted] = []

        def lose(hidden: Tensor) -> Tensor:
            if hidden.shape[:-1] != targets.shape:
                raise ValueError(
                    f"labels {list(targets.shape)} don't match the positions that reach the head "
                    f"{list(hidden.shape[:-1])}; something between them adds, drops or slices positions "
                    "(virtual tokens, logits_to_keep)."
                )
            flat, labels = hidden.flatten(0, -2), targets.reshape(-1).to(hidden.device)

            def compute(wanted: Tensor, labels: Tensor, **asked: Any) -> Rows:
                index = wanted.to(hidden.device)
                base_rows = positions.of(base_hidden, wanted).to(hidden.device)
                return self._rows(flat[index], base_rows, labels[index], base_head, **asked)

            rows = compute(positions.supervised, labels, full_kl=self.full_kl, token_statistics=token_statistics)
            # Apart, as their losses have another factor: an adapted or trainable head takes one factor a call.
            context = None
            if self.options.context_weight:
                context = compute(positions.context, torch.full_like(labels, CONTEXT_INDEX))
            index = torch.cat([positions.supervised, positions.context]).to(hidden.device)
            left.append(_Adapted(rows, context, index))
            if self.keep_logits:
                with torch.no_grad():
                    return self._tap.forward(hidden)
            return _After.apply(narrow(hidden), rows.loss, *([] if context is None else [context.loss]))

        prefix = self._shared()
        with nullcontext() if prefix is None else prefix.reusing(kwargs):
            return self._tap.run(self._previous, kwargs, lose), left[0]

    def _rows(self, hidden: Tensor, base_hidden: Tensor, labels: Tensor, base_head: Head | None, **asked: Any) -> Rows:
        """Each row's loss terms, ``[n]``, from both models' hidden states, ``[n, d]``."""
        head = self._tap.head(self._probed.transform)
        if self._tap.adapted or self._base_tap.adapted:
            if is_sharded(self._tap.module):
                raise RuntimeError(
                    "the head has an adapter, and its parts are sharded one by one (ZeRO-3, or FSDP1 as PEFT's wrap "
                    "policy does it): their gradients, which are taken in the forward, would not reach the optimizer. "
                    "Use DDP, ZeRO-2 or FSDP2, or leave the head out of the adapter."
                )
            from mask_the_target.adapted_head import adapted_head_rows  # brings torch's compiler with it

            return adapted_head_rows(
                hidden,
                base_hidden,
                self._tap.forward,
                self._run_base_head,
                labels,
                self.options,
                parameters=[p for p in self.model.parameters() if p.requires_grad],
                vocabulary=self._vocabulary,
                transform=self._probed.transform,
                base_transform=self._base_probed.transform,
                **asked,
            )
        other = None if base_head is None else _on(base_head, hidden.device)
        return linear_rows(hidden, base_hidden, head, labels, self.options, base_head=other, **asked)

    def _run_base_head(self, hidden: Tensor) -> Tensor:
        """The base's own head on its hidden states, ``[n, d] -> [n, V]``, before the transform."""
        tap = self._base_tap
        with evaluating(tap.module), self.base.context():
            return tap.forward(hidden.to(tap.head().weight.device)).to(hidden.device)

    def _record(
        self,
        rows: Rows,
        loss: Tensor,
        items: Tensor,
        count: Tensor,
        context_kl: Tensor,
        context_items: Tensor,
        context_count: Tensor,
    ) -> None:
        ce, kl = rows.ce.sum(), rows.kl.sum()
        full_kl = None if rows.full_kl is None else rows.full_kl.sum()
        excluded = rows.excluded.sum()
        self.last = Step(
            loss=loss.detach().clone(),  # trainers scale the one that they are given in place
            ce=ce / items,
            kl=kl / items,
            full_kl=None if full_kl is None else full_kl / items,
            supervised=count,
            excluded=excluded,
            context_kl=context_kl / context_items,
            context=context_count,
        )
        if not rows.loss.requires_grad:
            return  # a look, not a step
        self.totals = self.totals + Totals(
            forwards=1,
            ce=ce,
            kl=kl,
            full_kl=0.0 if full_kl is None else full_kl,
            supervised=count,
            excluded=excluded,
            context_kl=context_kl,
            context=context_count,
        )


def attach(
    model: nn.Module,
    options: TMKL = TMKL(),
    *,
    base: BaseChoice | Literal["cached"] | CachedBase | nn.Module | Base = "auto",
    cache: BaseCache | None = None,
    full_kl: bool = False,
) -> Attachment:
    """Make ``model(**batch).loss`` in training CE + weight * target-masked KL to the base model.

    Args:
        model: a PEFT model, a transformers model with an adapter of its own, or either inside DDP, a compiled module
            or another wrapper with ``.module``. It must have its adapter already.
        options: the objective, see :class:`~mask_the_target.TMKL`.
        base: ``"auto"``, ``"off"``, ``"initial"``, a separate frozen model, or what
            :func:`~mask_the_target.base.resolve_base` found before the adapter's weights moved. ``"cached"``, or
            :class:`~mask_the_target.CachedBase` with its settings: ``"auto"``, with the base's final hidden states
            kept on disk, so that the base pass runs in the first epoch only.
        cache: what answers the base passes of a ``base`` that is resolved already; ``"cached"`` makes its own.
        full_kl: also measure the full-vocabulary KL at each step, in ``attachment.last.full_kl``.

    Returns:
        An :class:`Attachment`; ``with attach(model): ...`` detaches at the end.

    Raises:
        ValueError: where the loss or the base would not be exact: no head, no adapter, a merged or prompt-learning
            adapter, trainable weights outside it, base weights that were rewritten, logits or a loss that are not what
            the probe expects.
    """
    inner, configs = unwrap(model)
    if attachment_of(inner) is not None:
        raise ValueError("TMKL is attached to this model already; call detach(model) first to change its options.")
    choice, cached = cache_of(base)
    resolved = choice if isinstance(choice, Base) else resolve_base(inner, choice, configs=configs)
    cache = cache if cached is None else BaseCache(cached, resolved)
    with gathering(inner):
        return Attachment(inner, options, resolved, full_kl, cache)


def cache_of(base: Any) -> tuple[Any, CachedBase | None]:
    """``base=`` without its cache, and the cache's settings: ``"cached"`` is ``CachedBase()``."""
    cached = CachedBase() if isinstance(base, str) and base == "cached" else base
    return (cached.base, cached) if isinstance(cached, CachedBase) else (base, None)


# By the id of the inner causal LM, whose forward holds the attachment. Not found by way of that forward: what wraps it
# later need not lead to it (TRL's wrapper names the class's own as what it wraps).
_ATTACHED: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`. Raises ValueError if nothing is attached."""
    attachment = attachment_of(inner_model(model))
    if attachment is None:
        raise ValueError("TMKL is not attached to this model.")
    attachment.detach()


def attachment_of(inner: nn.Module) -> Attachment | None:
    """The active attachment of an inner causal LM, also where other tools have wrapped its forward since."""
    attachment = _ATTACHED.get(id(inner))
    return attachment if attachment is not None and attachment._active and attachment.model is inner else None


def inner_model(model: nn.Module) -> nn.Module:
    """The inner causal LM under every wrapper.

    Raises:
        ValueError: for ``nn.DataParallel``, whose replicas would all run the original's weights.
    """
    *_, inner = _wrapped(model)
    return inner


def unwrap(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The inner causal LM, and PEFT's adapter configs by name, also those of adapters that were put on a part of it (a
    backbone): these by its path and their name. It walks through all modules; see :func:`inner_model`, which doesn't.

    Raises what :func:`inner_model` raises.
    """
    from peft import PeftMixedModel, PeftModel

    *wrappers, inner = _wrapped(model)
    configs: dict[str, Any] = {}
    for wrapper in wrappers:
        if isinstance(wrapper, (PeftModel, PeftMixedModel)):
            configs.update(wrapper.peft_config)
    for path, module in inner.named_modules():
        own = module.__dict__.get("peft_config")
        for name, config in own.items() if isinstance(own, dict) else ():
            if all(config is not other for other in configs.values()):
                configs[f"{path}.{name}" if path else name] = config
    return inner, configs


def _wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what each of its wrappers stands around; the last is the inner causal LM."""
    from peft import PeftMixedModel, PeftModel

    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "nn.DataParallel copies the model in every step, and the copies would run the original's weights. Use "
                "one process for each device (accelerate launch, torchrun), or make one device visible."
            )
        yield model
        if isinstance(model, (PeftModel, PeftMixedModel)):
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "get_output_embeddings"):
            model = model.module  # type: ignore[assignment]  # DDP, FSDP1, DeepSpeed
        else:
            return


def count_context(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """How many context positions a training batch has: ``num_context_in_batch`` is their sum over a step's batches.

    Args:
        model: a model with TMKL attached.
        batch: what its forward is called with, labels included.

    Raises:
        ValueError: if nothing is attached, or the positions can't be told (see :class:`~mask_the_target.TMKL`).
    """
    attachment = attachment_of(inner_model(model))
    if attachment is None:
        raise ValueError("TMKL is not attached to this model.")
    return attachment.count_context(batch)


class _After(torch.autograd.Function):
    """What the head shows in the logits' place, as something that was computed from the losses; its gradient is zero.

    With :class:`_Before`, the backward of the losses begins at what the head's module gave. Wrappers that gather the
    weights of a module for its backward (FSDP2) wait for that: where the head shares a unit with the final norm, the
    norm's weights would be freed memory. Only of the stand-in: through logits of the vocabulary's width, zeros of that
    size would go back.
    """

    @staticmethod
    def forward(ctx: Any, shown: Tensor, *losses: Tensor) -> Tensor:
        ctx.save_for_backward(*losses)
        return shown.view_as(shown)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, *(torch.zeros_like(loss) for loss in ctx.saved_tensors)


class _Before(torch.autograd.Function):
    """The losses, as something that was computed from what the head showed too; its gradient is zero."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, shown: Tensor) -> Tensor:
        ctx.shown = torch.zeros((), dtype=shown.dtype, device=shown.device).expand(shown.shape)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], ctx.shown


def _take_targets(inputs: dict[str, Any], *, shift: bool) -> Tensor:
    """``[B, T]``: position t predicts the label at t + 1; under context parallelism labels come shifted already."""
    labels, shift_labels = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shift_labels is not None:
        return shift_labels
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX) if shift else labels


def _supervised(targets: Tensor) -> Tensor:
    """``[n]``: indices of the supervised positions in the flattened ``[B * T]``."""
    return (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)


def _on(head: Head, device: torch.device) -> Head:
    return Head(head.weight.to(device), None if head.bias is None else head.bias.to(device), head.transform)
