"""Heads and transforms of real architectures at toy size: found by the probe, exact against the two-model reference."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from conftest import batch, toy_llama, with_lora
from mask_the_target import TMKL, attach
from mask_the_target.head import HeadTap, LogitTransform, probe
from reference import distance, gradients, reference_loss

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}

# class, config, and what its modeling code does to the head's output
FAMILIES = [
    ("Gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 4}, LogitTransform(1.0, 5.0)),
    ("Cohere", {"logit_scale": 0.0625}, LogitTransform(0.0625)),
    ("Granite", {"logits_scaling": 8.0}, LogitTransform(1 / 8.0)),
    ("HyperCLOVAX", {"logits_scaling": 3.0}, LogitTransform(3.0)),
    ("Phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, LogitTransform()),  # a head with a bias
    ("Qwen2", {"tie_word_embeddings": True}, LogitTransform()),
    ("Mistral", {"tie_word_embeddings": False}, LogitTransform()),
    ("Olmo2", {}, LogitTransform()),
]


def _build(family: str, config: dict[str, Any]) -> nn.Module:
    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**(SMALL | config)))
    for parameter in model.parameters():  # biases too, which start at 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.train()


@pytest.mark.parametrize(("family", "config", "transform"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_the_transform_is_measured_and_the_loss_exact(
    family: str, config: dict[str, Any], transform: LogitTransform
) -> None:
    base = _build(family, config)
    model = with_lora(copy.deepcopy(base), moved=0.1, target_modules=["q_proj", "v_proj"])
    data = batch()
    options = TMKL(weight=0.7)
    expected = reference_loss(model, base, data, options)
    wanted = gradients(expected.loss, model)
    with attach(model, options) as attachment:
        measured = attachment._probed.transform
        assert measured.scale == pytest.approx(transform.scale, rel=1e-6)
        assert (measured.softcap or 0) == pytest.approx(transform.softcap or 0, rel=1e-6)
        loss = model(**data).loss
        assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert distance(gradients(loss, model), wanted) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_other_kinds_of_backbones(family: str) -> None:
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout))
        targets = ["c_attn"]
    else:
        sizes = {"vocab_size": 48, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
        base = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
        targets = ["x_proj", "in_proj"]
    model = with_lora(copy.deepcopy(base), moved=0.1, target_modules=targets)
    data = batch()
    expected = reference_loss(model, base, data, TMKL())
    with attach(model):
        loss = model(**data).loss
        assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert distance(gradients(loss, model), gradients(expected.loss, model)) < 1e-5


def test_bfloat16_models_are_proved_to_their_own_rounding() -> None:
    base = toy_llama().to(torch.bfloat16)
    model = with_lora(copy.deepcopy(base))
    with attach(model, full_kl=True) as attachment:
        model(**batch()).loss.backward()
        assert float(attachment.last.kl) == 0


class _Odd(nn.Module):
    """Something between the head and the logits that is not a scale or a soft cap."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = toy_llama()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        logits = output.logits
        if self.kind == "masked column":
            logits = logits.clone()
            logits[..., 7] = -1e4
        elif self.kind == "shifted":
            logits = logits + 1.0
        elif self.kind == "sliced":
            logits = logits[..., :40]
        elif self.kind == "z-loss" and output.loss is not None:
            output.loss = output.loss + 0.1 * logits.logsumexp(-1).square().mean()
        output.logits = logits
        return output


class _FollowsLabels(_Odd):
    """Reads to the right where token types come without labels, as PaliGemma before transformers 5."""

    def forward(self, input_ids: Tensor, token_type_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        if labels is None and token_type_ids is not None and token_type_ids.any():
            input_ids = input_ids.flip(1)
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("masked column", "does more to its logits than scale or soft-cap them"),
        ("shifted", "transform of its head's output on a probe of eight tokens differs"),
        ("sliced", "returns 40 logits from a head of 48 tokens"),
        ("z-loss", "it trains on another loss than next-token cross-entropy"),
        ("follows labels", "or labels change its logits (PaliGemma's, before transformers 5)"),
    ],
)
def test_what_the_probe_can_not_prove_is_refused(kind: str, message: str) -> None:
    odd = _FollowsLabels(kind) if kind == "follows labels" else _Odd(kind)
    tap = HeadTap(odd.inner)
    with pytest.raises(ValueError) as error:
        probe(odd.inner, odd.forward, tap)
    assert message in str(error.value)


def test_a_head_with_something_of_its_own_is_refused() -> None:
    model = toy_llama()
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x) + x.mean(-1, keepdim=True)
    with pytest.raises(ValueError, match=r"logits on a probe of eight tokens differs from transform\(head"):
        attach(with_lora(model))


def test_a_head_that_is_called_twice_is_refused() -> None:
    model = toy_llama()
    own = model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        own(*args, **kwargs)
        return own(*args, **kwargs)

    model.forward = twice
    with pytest.raises((RuntimeError, ValueError), match="called its head 2 times, not once"):
        attach(with_lora(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_decoders_are_refused(dtype: torch.dtype) -> None:
    sizes = {"vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.3}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)).to(dtype)
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        attach(with_lora(model, target_modules=["q_proj"]))
