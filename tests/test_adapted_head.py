"""A head with an adapter of its own, against the dense two-model reference: loss and every gradient."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from conftest import batch, move, toy_llama
from mask_the_target import TMKL, CachedBase, adapted_head, attach
from mask_the_target.adapted_head import adapted_head_rows
from mask_the_target.rows_torch import Rows
from reference import distance, gradients, reference_loss

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"]}
CONFIGS: dict[str, tuple[Any, bool]] = {  # a PEFT config, and whether head and embeddings share their weight
    "lora": (peft.LoraConfig(**LORA), False),
    "lora, tied": (peft.LoraConfig(**LORA), True),
    "lora on head and embeddings, tied": (
        peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head", "embed_tokens"]),
        True,
    ),
    "dora": (peft.LoraConfig(**LORA, use_dora=True), False),
    "pissa": (peft.LoraConfig(**LORA, init_lora_weights="pissa"), False),
    "loha": (peft.LoHaConfig(r=3, target_modules=["q_proj", "lm_head"]), False),
    "vera": (peft.VeraConfig(r=8, target_modules=["lm_head"]), False),
    "saved": (peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]), False),
    "saved, tied before": (
        peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        True,
    ),
    "saved, tied on purpose": (
        peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
        True,
    ),
    "lora, tied on purpose": (peft.LoraConfig(**LORA, ensure_weight_tying=True), True),
    "trainable tokens": (peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[5, 9]), True),
}


def _pair(case: str) -> tuple[nn.Module, nn.Module]:
    config, tied = CONFIGS[case]
    base = toy_llama(tie_word_embeddings=tied)
    model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).train()
    return model, base


@pytest.mark.filterwarnings("error:.*could not be proved")
@pytest.mark.parametrize("case", CONFIGS)
def test_loss_and_gradients_equal_the_two_model_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted_head, "rows_of_chunk", lambda *_: 4)  # several chunks, the last one short
    model, base = _pair(case)
    data = batch()
    fresh = True
    for options in (TMKL(), TMKL(weight=0.6, divergence="jsd", temperature=2.0), TMKL(mask_target=False)):
        with attach(model, options, full_kl=True) as attachment:
            assert attachment._tap.adapted
            if fresh:
                model(**data)
                assert abs(float(attachment.last.full_kl)) < 1e-5  # before training, at the true base
            fresh = False
            move(model, 0.05)
            expected = reference_loss(model, base, data, options)
            wanted = gradients(expected.loss, model)
            loss = model(**data).loss
            assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
            assert float(attachment.last.kl) == pytest.approx(float(expected.kl), rel=1e-4, abs=1e-7)
            own = gradients(3 * loss, model)
            assert distance(own, {name: 3 * gradient for name, gradient in wanted.items()}) < 1e-5
        if case == "pissa":
            break  # moved: the initial adapter is gone, and attaching again would be refused


def test_the_base_may_be_another_model_or_come_from_a_cache(tmp_path: Any) -> None:
    model, base = _pair("lora")
    move(model, 0.1)
    data = batch()
    expected = float(reference_loss(model, base, data, TMKL()).loss)
    with attach(model, base=base):
        assert float(model(**data).loss) == pytest.approx(expected, rel=1e-5)
    with attach(model, base=CachedBase(folder=tmp_path)):
        for _ in range(2):
            assert float(model(**data).loss) == pytest.approx(expected, rel=1e-5)


def test_flags_and_training_modes_are_as_before_also_after_an_error() -> None:
    model, _ = _pair("dora")
    data = batch()
    before = [(n, m.training, getattr(m, "_disable_adapters", None)) for n, m in model.named_modules()]
    with attach(model) as attachment:
        model(**data).loss.backward()
        assert [(n, m.training, getattr(m, "_disable_adapters", None)) for n, m in model.named_modules()] == before
        own, attachment._base_tap.forward = attachment._base_tap.forward, lambda hidden: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(**data)
        attachment._base_tap.forward = own
    assert [(n, m.training, getattr(m, "_disable_adapters", None)) for n, m in model.named_modules()] == before


def test_rows_weighted_one_by_one_are_refused_and_an_empty_batch_is_zero() -> None:
    torch.manual_seed(0)
    head, base_head = nn.Linear(4, 11), nn.Linear(4, 11)

    def rows(hidden: torch.Tensor, labels: torch.Tensor) -> Rows:
        parameters = list(head.parameters())
        return adapted_head_rows(
            hidden, hidden.detach(), head, base_head, labels, TMKL(), parameters=parameters, vocabulary=11
        )

    hidden = torch.randn(5, 4, requires_grad=True)
    loss = rows(hidden, torch.arange(5)).loss
    with pytest.raises(ValueError, match="weighted one by one, which needs a frozen head"):
        (loss * torch.arange(5)).sum().backward()
    empty = rows(hidden[:0], torch.arange(0)).loss
    assert float(empty.sum()) == 0
    empty.sum().backward()
    assert float(head.weight.grad.abs().max()) == 0
    with torch.no_grad():
        assert torch.equal(rows(hidden, torch.arange(5)).loss, loss)
