"""Layers before the first adapter run once a step, and nothing but that changes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import SIZES, batch, toy_llama, with_lora
from mask_the_target import attach

FOUR_LAYERS = SIZES | {"num_hidden_layers": 4, "head_dim": 4}


def llama(**config: Any) -> PreTrainedModel:
    return toy_llama(num_hidden_layers=4, **config)


def gemma2() -> PreTrainedModel:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**FOUR_LAYERS, query_pre_attn_scalar=8))


def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**FOUR_LAYERS))


def gpt2(dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=4, n_head=4, initializer_range=0.3, **drops))


def adapted(model: PreTrainedModel, layers: list[int], **config: Any) -> PeftModel:
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "down_proj"]
    return with_lora(model, moved=0.1, layers_to_transform=layers, target_modules=targets, lora_dropout=0.0, **config)


@contextmanager
def layer_calls(model: PeftModel) -> Iterator[Counter]:
    """How often each decoder layer's attention ran."""
    counts: Counter = Counter()
    inner = model.get_base_model()
    layers = inner.transformer.h if hasattr(inner, "transformer") else inner.model.layers
    parts = [layer.attn if hasattr(layer, "attn") else layer.self_attn for layer in layers]
    hooks = [
        part.register_forward_hook(lambda *_, number=number: counts.update([number]))
        for number, part in enumerate(parts)
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def step(model: PeftModel, share: bool = True, **inputs: Any) -> tuple[float, list[torch.Tensor], Counter]:
    """Loss, adapter gradients, and the calls of one training forward and backward."""
    with layer_calls(model) as counts, attach(model) as attachment:
        if not share:
            attachment.prefix = None
        counts.clear()
        loss = model(**(inputs or batch())).loss
        weights = [p for p in model.parameters() if p.requires_grad]
        loss.backward()
        gradients = [p.grad.clone() for p in weights]
        model.zero_grad()
        return float(loss.detach()), gradients, counts


def packed() -> dict[str, torch.Tensor]:
    whole = batch(rows=2, length=8)
    positions = torch.arange(8).repeat(2)[None]
    return {
        "input_ids": whole["input_ids"].view(1, -1),
        "labels": whole["labels"].view(1, -1),
        "position_ids": positions,
    }


@pytest.mark.parametrize("inputs", [batch, packed])
@pytest.mark.parametrize("build", [llama, gemma2, qwen3, gpt2])
def test_the_step_is_the_same_and_the_layers_run_once(build: Any, inputs: Any) -> None:
    model = adapted(build(), [2, 3])
    expected, expected_gradients, twice = step(model, share=False, **inputs())
    loss, gradients, once = step(model, **inputs())
    assert loss == expected
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
    assert any(g.abs().sum() > 0 for g in gradients)
    assert twice == {0: 2, 1: 2, 2: 2, 3: 2}
    assert once == {0: 1, 1: 1, 2: 2, 3: 2}


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    model = adapted(llama(), [2, 3])
    expected, expected_gradients, _ = step(model, share=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss, gradients, counts = step(model)
    assert loss == pytest.approx(expected, rel=1e-6)
    for own, other in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-7)
    assert counts == {0: 1, 1: 1, 2: 3, 3: 3}  # the adapted layers once more, in the backward


def test_with_the_initial_adapter_as_base() -> None:
    model = with_lora(llama(), init_lora_weights="pissa", layers_to_transform=[1, 3])
    _, _, counts = step(model)
    assert counts == {0: 1, 1: 2, 2: 2, 3: 2}


@pytest.mark.parametrize(
    "model",
    [
        lambda: adapted(llama(), [0, 3]),
        lambda: adapted(gpt2(dropout=0.1), [2, 3]),
        lambda: adapted(llama(attention_dropout=0.2), [2, 3]),
        lambda: adapted(llama(), [2, 3], modules_to_save=["embed_tokens"]),
    ],
    ids=["adapter on the first layer", "dropout", "attention dropout", "embeddings"],
)
def test_nothing_is_shared_where_it_would_differ(model: Any) -> None:
    with attach(model()) as attachment:
        assert attachment.prefix is None


def test_layers_whose_own_outputs_are_asked_for_run() -> None:
    model = adapted(llama(), [2, 3])
    with attach(model) as attachment:
        own = model(**batch(), output_hidden_states=True).hidden_states
        attachment.prefix = None
        expected = model(**batch(), output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def test_noise_that_is_switched_on_later_is_noticed() -> None:
    model = adapted(llama(), [2, 3])
    with layer_calls(model) as counts, attach(model) as attachment:
        assert attachment.prefix is not None
        counts.clear()
        noise = lambda module, inputs, output: output + 0.1 * torch.randn_like(output) * module.training  # noqa: E731
        hook = model.get_input_embeddings().register_forward_hook(noise)
        model(**batch())
        assert counts[0] == 2
        hook.remove()
        model(**batch())
        assert counts[0] == 3


def test_finding_it_leaves_the_model_as_it_was() -> None:
    model = adapted(llama(), [2, 3])
    model.get_base_model().model.layers[0].eval()
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state = torch.random.get_rng_state()
    with attach(model) as attachment:
        assert attachment.prefix is not None
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any("forward" in vars(layer) for layer in model.get_base_model().model.layers)
