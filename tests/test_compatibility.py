"""A slice of the adapters' matrix (all of it: make compatibility); and its checks, and attach's, can fail."""

import copy
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from compatibility import backbones, tuners
from compatibility.check import Outcome, check
from conftest import batch, toy_llama, with_lora
from mask_the_target import attach, base
from mask_the_target.attach import Attachment
from mask_the_target.base import Base, adapters_off
from mask_the_target.head import LogitTransform

CASES = {case.name: case for case in tuners.enumerate_cases()}
EXACT = [  # the paper's seven adapters; each way of anchoring; each kind of layer
    *("LORA", "SINELORA", "ADALORA", "VERA", "RANDLORA", "LOHA", "OFT", "IA3", "LN_TUNING", "TRAINABLE_TOKENS"),
    *("LORA, use_dora", "LORA, use_rslora", "LORA, init_lora_weights='pissa'", "LORA, init_lora_weights='olora'"),
    *("LORA, init_lora_weights='lora_ga'", "LORA, init_lora_weights='eva'", "LORA on embeddings", "LORA on the head"),
    *("DoRA on the head", "LORA, modules_to_save=lm_head", "LORA, trainable_token_indices"),
    *("LORA, target_parameters (experts)", "LORA, two adapters, both active", "LORA, trained before, base='off'"),
]
REFUSED = {
    "PREFIX_TUNING": r"prompt learning \(PREFIX_TUNING\).* Use LoRA or another weight adapter",
    "ADAPTION_PROMPT": r"\(ADAPTION_PROMPT\) has no layer that could be turned off .* Use LoRA",
    "SHADOW": r"runs a second network .* Use LoRA",
    "POLY": r"needs more than they|Only models that can be run on text alone",
    "XLORA": r"adapter layers, turned off, don't give what the layers below.* pass a separately loaded",
    "LORA, bias='all'": r"bias='all', which trains \d+ biases .* Use bias='none'",
    "LORA, layer_replication": r"layer_replication, .* Pass a separately loaded model",
    "LORA, kasa_config": r"KaSA, which truncates the base weights .* Pass a separately loaded model",
    "LORA, merged": r"is merged into the base weights.* Call model.unmerge_adapter\(\) first",
    "LORA on a PiSSA, base='off'": r"'pissa', which subtracted .* Use base='initial'",
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    outcome = tuners.run(CASES[name])
    assert outcome.outcome == "exact", outcome.why


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_a_sentence_that_names_the_remedy(name: str) -> None:
    if name not in CASES:
        pytest.skip("this PEFT doesn't have it")
    outcome = tuners.run(CASES[name])
    assert outcome.outcome == "refused", outcome
    with pytest.raises(AssertionError, match=REFUSED[name]):
        raise AssertionError(outcome.why)


def test_every_type_of_the_installed_peft_is_a_case() -> None:
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        assert str(getattr(kind, "value", kind)) in CASES


def _keep_adapters_on(attachment: Attachment) -> None:
    object.__setattr__(attachment.base, "context", nullcontext)


def _scale_logits(attachment: Attachment) -> None:
    attachment._probed = attachment._base_probed = attachment._probed._replace(transform=LogitTransform(1.05))


def _take_labels_as_they_are(attachment: Attachment) -> None:
    attachment._probed = attachment._probed._replace(shifts_labels=False)


def _drop_the_regulariser(attachment: Attachment) -> None:
    attachment.options = type(attachment.options)(weight=0.0)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_keep_adapters_on, "after a step, off is not the original|the KL|loss"),
        (_scale_logits, "the loss"),
        (_take_labels_as_they_are, "the loss"),
        (_drop_the_regulariser, "the loss|the gradient"),
    ],
)
def test_a_broken_toggle_transform_or_term_is_called_wrong(spoil: Any, why: str) -> None:
    original = tuners.toy()
    model = with_lora(copy.deepcopy(original))
    outcome = check("broken", original, model, batch(vocabulary=96), spoil=spoil)
    assert outcome.outcome == "wrong"
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(outcome.why)


def test_a_false_anchor_is_called_wrong() -> None:
    original = tuners.toy()
    model = tuners._lora(copy.deepcopy(original), init_lora_weights="pissa")
    inner = model.get_base_model()
    outcome = check(
        "residual", original, model, batch(vocabulary=96), base=Base("off", inner, lambda: adapters_off(inner))
    )
    assert (outcome.outcome, outcome.why[:46]) == ("wrong", "before training, off is not the original bit f")


def test_attach_itself_notices_a_toggle_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(toy_llama(), moved=0.1)
    monkeypatch.setattr(base, "adapters_off", lambda model: nullcontext())
    with pytest.raises(
        ValueError, match=r"(?s)turned off does not give the base back|don't give what the layers below"
    ):
        attach(model)
    inner = model.get_base_model()
    with pytest.raises(ValueError, match=r"6 adapter layers, turned off, don't give what the layers below them give"):
        attach(model, base=Base("off", inner, nullcontext))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_attach_itself_notices_an_initialisation_that_it_does_not_know(
    init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an unknown initialisation of a later PEFT, which takes its start out of the base weights, would be."""
    monkeypatch.setattr(base, "_SUBTRACTING_INITS", ("nothing",))
    model = with_lora(toy_llama(), init_lora_weights=init)
    with pytest.raises(
        ValueError, match=r"adapter 'default' \(LORA\) turned off does not give the base back: .* the logits differ by"
    ):
        attach(model)


def test_what_cannot_be_proved_is_said_once_and_leaves_the_random_numbers_alone() -> None:
    model = peft.get_peft_model(
        toy_llama(), peft.C3AConfig(block_size=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    config = model.peft_config["default"]
    config.block_size = 7  # divides nothing of the toy's
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"\(C3A\): that the model with it turned off is the base could not be proved"):
        attach(model).detach()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_page_counts_types_and_not_ways_to_use_them() -> None:
    prompt = "adapter 'default' is prompt learning (CPT): it adds virtual tokens in front of the sequence"
    outcomes = [Outcome("LORA", "exact"), Outcome("POLY", "refused", "no"), Outcome("XLORA", "refused", "no")]
    outcomes += [Outcome("CPT", "refused", prompt), Outcome("LORA, merged", "refused", "merged")]
    assert tuners.summary(outcomes).startswith(
        "Of 2 types that train an update of weights 1 are exact; not POLY. Refused on purpose"
    )
    outcomes = [Outcome("llama", "exact"), Outcome("dory", "refused"), Outcome("gemma3n", "not built")]
    outcomes += [Outcome("llama, adapter on the last layer", "exact"), Outcome("blip (image-text model)", "refused")]
    assert backbones.summary(outcomes) == "Of 2 causal-LM types that can be built 1 are exact; not dory."
