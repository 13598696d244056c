"""A slice of the matrix of backbones; `make compatibility` runs all of it."""

import re
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from compatibility.backbones import enumerate_cases, run
from conftest import toy_llama, with_lora
from mask_the_target import attach

CASES = {case.name: case for case in enumerate_cases()}
EXACT = [
    "llama",
    "qwen2, tie_word_embeddings=True",
    "gemma2",  # a soft cap
    "cohere",  # a scale
    "granite",  # logits that are divided
    "falcon_h1",  # a multiplier in a hybrid
    "llama, head with a bias",
    "llama, padded vocabulary",
    "gpt2",
    "mamba",
    "jamba, adapter on the last layer",
    "mixtral, output_router_logits=True",
    "jetmoe, output_router_logits=True",  # its factor has another name
    "bart",  # compares logits with the labels of their own position
    "flint",  # fails when it is asked for its router's logits
    "llava (with images)",
    "qwen2_5_vl (with images)",
    "gemma3 (with images)",
]


def _require_known(name: str) -> None:
    model_type = name.split(",")[0].split(" ")[0]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")


@pytest.mark.parametrize("name", EXACT)
def test_a_backbone_is_exact(name: str) -> None:
    _require_known(name)
    outcome = run(CASES[name])
    assert (outcome.outcome, outcome.why) == ("exact", "")
    assert outcome.step0_kl == 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "git",
            r"GitForCausalLM's forward fails on a probe of eight text tokens \(ValueError: .*that can be run on text",
        ),
        ("dory", r"DoryForCausalLM's logits on a probe of eight tokens differs from transform\(head\(hidden states"),
        ("musicgen", "the head of MusicgenForCausalLM is a ModuleList without"),
    ],
)
def test_a_refused_backbone_says_why(name: str, why: str) -> None:
    _require_known(name)
    outcome = run(CASES[name])
    assert outcome.outcome == "refused"
    assert re.match(why, outcome.why), outcome.why


def test_an_auxiliary_loss_of_unknown_factor_is_refused() -> None:
    model = with_lora(toy_llama())
    inner = model.get_base_model()
    own = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.aux_loss = torch.tensor(1.0)
        return output

    inner.forward = forward
    with pytest.raises(ValueError, match=r"LlamaForCausalLM returns an auxiliary loss .* has its factor"):
        attach(model)


def test_every_type_of_transformers_is_a_case() -> None:
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(CASES)
    missing = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - {name.split(" (")[0] for name in CASES}
    # Only those whose class is their causal LM's.
    assert all(
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(t) == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[t] for t in missing
    )
    assert len(CASES) == len(enumerate_cases()), "two cases have one name"


def test_a_model_without_its_parts_is_not_built() -> None:
    _require_known("blip-2")
    outcome = run(CASES["blip-2 (image-text model)"])
    assert outcome.outcome == "not built"
    assert "pixel_values" in outcome.why
