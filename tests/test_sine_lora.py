"""SineLoRA against its formula, and through PEFT's life: saved, loaded, toggled, refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

from conftest import move, toy_llama
from mask_the_target.base import adapters_off
from mask_the_target.sine_lora import SineLoraConfig

OLD = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21)


@pytest.fixture(autouse=True)
def _needs_a_peft_that_saves_it(request: pytest.FixtureRequest) -> None:
    if OLD and request.function is not test_a_peft_that_cannot_save_it_is_refused:
        pytest.skip(f"SineLoRA needs PEFT 0.21, and this is {peft.__version__}")


def test_a_peft_that_cannot_save_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.20.1")
    with pytest.raises(ImportError, match=r"SineLoRA needs PEFT 0.21 or newer, and 0.20.1 is.*pip install -U peft"):
        SineLoraConfig(target_modules=["q_proj"])


def test_layer_computes_the_formula_and_its_gradients_in_float64() -> None:
    base = toy_llama().double()
    model = get_peft_model(base, SineLoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    layer = base.model.layers[0].self_attn.q_proj
    move(model, 0.3)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b = (p.data.double().requires_grad_() for p in (a, b))
    layer.double()
    expected = x @ w.t() + 5 / 3 * torch.sin(x @ a.t()) @ b.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    factor = torch.randn_like(expected)
    own = torch.autograd.grad(
        (layer(x) * factor).sum(), list(layer.lora_A.parameters()) + list(layer.lora_B.parameters())
    )
    other = torch.autograd.grad((expected * factor).sum(), [a, b])
    for grad, wanted in zip(own, other, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


def test_saves_loads_and_toggles_as_any_other(tmp_path) -> None:
    base = toy_llama()
    ids = torch.arange(10).reshape(1, 10)
    before = base(ids).logits
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, SineLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(model(ids).logits, before)  # B starts at 0
    move(model, 0.3)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, before)
    with adapters_off(base):
        assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SINELORA"
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(loaded(ids).logits, adapted)
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, before)


def test_an_installation_without_it_fails_and_never_takes_it_for_lora(tmp_path) -> None:
    get_peft_model(toy_llama(), SineLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode != 0
    assert "SINELORA" in found.stderr


def test_merging_and_meaningless_combinations_are_refused() -> None:
    model = get_peft_model(toy_llama(), SineLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="can't be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="'pissa' is made for the product B A"):
        SineLoraConfig(init_lora_weights="pissa")
    with pytest.raises(ValueError, match="another variant of LoRA, and DoraLinearVariant is on"):
        get_peft_model(toy_llama(), SineLoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="'embed_tokens' is a Embedding"):
        get_peft_model(toy_llama(), SineLoraConfig(target_modules=["embed_tokens"]))
