"""The toggle, the choice of the base, and each sentence of the audit."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from conftest import TARGETS, batch, move, toy_llama, with_lora
from mask_the_target import attach
from mask_the_target.attach import unwrap
from mask_the_target.base import BaseWeights, adapter_parameters, adapters_off, resolve_base
from mask_the_target.head import evaluating


def _logits(model: nn.Module) -> torch.Tensor:
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad(), evaluating(model):
        return model(**inputs).logits


def _resolve(model: nn.Module, base: object = "auto") -> object:
    inner, configs = unwrap(model)
    return resolve_base(inner, base, configs=configs)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["gate_proj"]}])
def test_adapters_off_is_the_original_model_bit_for_bit(config: dict) -> None:
    model = toy_llama()
    original = copy.deepcopy(model)
    peft_model = with_lora(model, moved=0.3, **config)
    assert not torch.allclose(_logits(peft_model), _logits(original))
    with adapters_off(peft_model):
        assert torch.equal(_logits(peft_model), _logits(original))
    assert not torch.allclose(_logits(peft_model), _logits(original))


def test_adapters_off_restores_every_flag_also_after_an_exception() -> None:
    peft_model = with_lora(toy_llama(), modules_to_save=["gate_proj"])
    frozen = next(p for n, p in peft_model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)  # LoRA-FA by hand: PEFT's own disable_adapter would thaw it
    layers = [m for m in peft_model.modules() if hasattr(m, "_disable_adapters")]
    layers[1]._disable_adapters = True  # an irregular state, kept
    before = [m._disable_adapters for m in layers], [p.requires_grad for p in peft_model.parameters()]

    def inside() -> None:
        with adapters_off(peft_model):
            assert all(m._disable_adapters for m in layers)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert before == ([m._disable_adapters for m in layers], [p.requires_grad for p in peft_model.parameters()])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_rewrite_the_base_are_anchored_to_the_true_base(init: str) -> None:
    model = toy_llama()
    original = copy.deepcopy(model)
    peft_model = with_lora(model, init_lora_weights=init)
    base = _resolve(peft_model)
    assert base.kind == "initial"
    move(peft_model, 0.3)
    adapted = _logits(peft_model)
    with base.context():
        anchored = _logits(peft_model)
    with adapters_off(peft_model):
        off = _logits(peft_model)
    scale = _logits(original).abs().max()
    assert (anchored - _logits(original)).abs().max() < 1e-5 * scale
    assert (off - _logits(original)).abs().max() > 0.1 * scale  # the trap is real
    assert torch.equal(_logits(peft_model), adapted)  # and the adapter is as it was


def test_initial_restores_the_adapter_after_an_exception() -> None:
    peft_model = with_lora(toy_llama(), moved=0.1)
    base = _resolve(peft_model, "initial")
    move(peft_model, 0.1, seed=2)
    before = [p.detach().clone() for p in peft_model.parameters()]
    with pytest.raises(RuntimeError), base.context():
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(before, peft_model.parameters(), strict=True))


def test_a_trained_adapter_may_be_anchored_to_the_base_or_to_itself() -> None:
    model = toy_llama()
    original = copy.deepcopy(model)
    peft_model = with_lora(model, moved=0.3)
    start = _logits(peft_model)
    assert _resolve(peft_model).kind == "off"
    initial = _resolve(peft_model, "initial")
    move(peft_model, 0.3, seed=2)
    with initial.context():
        assert torch.equal(_logits(peft_model), start)
    with _resolve(peft_model, "off").context():
        assert torch.equal(_logits(peft_model), _logits(original))


def _bias() -> nn.Module:
    return with_lora(toy_llama(attention_bias=True), bias="all")


def _unfrozen() -> nn.Module:
    model = with_lora(toy_llama())
    model.base_model.model.model.norm.weight.requires_grad_()
    return model


def _merged() -> nn.Module:
    model = with_lora(toy_llama(), moved=0.1)
    model.merge_adapter()
    return model


def _trained_pissa() -> nn.Module:
    model = with_lora(toy_llama(), init_lora_weights="pissa")
    move(model, 0.2)
    return model


def _barely_trained(init: str) -> nn.Module:
    model = with_lora(toy_llama(), init_lora_weights=init)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers.1" in name and "lora_B" in name:  # not the first layer
                p += (
                    0.02
                    * p.norm()
                    / p.numel() ** 0.5
                    * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
                )
    return model


def _saved_start(init: str, dtype: torch.dtype) -> nn.Module:
    """As PEFT's recipe for PiSSA leaves it: what is left of the base, and the start beside it as an ordinary LoRA."""
    model = with_lora(toy_llama(), init_lora_weights=init)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(dtype).float()
    model.peft_config["default"].init_lora_weights = True
    return model


def _pissa_beside_trained() -> nn.Module:
    model = with_lora(toy_llama(), moved=0.3)
    model.add_adapter("second", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"))
    model.base_model.set_adapter(["default", "second"])
    return model


def _loftq() -> nn.Module:
    model = with_lora(toy_llama())
    model.peft_config["default"].init_lora_weights = "loftq"  # the initialisation itself needs a GPU's quantiser
    return model


@pytest.mark.parametrize(
    ("make", "base", "message"),
    [
        (toy_llama, "auto", "LlamaForCausalLM has no adapter layer, so there is no base to turn to. Add one first"),
        (_merged, "auto", "adapter 'default' is merged into the base weights"),
        (
            lambda: get_peft_model(toy_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
            "auto",
            "adapter 'default' is prompt learning (PROMPT_TUNING)",
        ),
        (_bias, "auto", "has bias='all', which trains 8 biases of the base in place"),
        (_unfrozen, "auto", "1 weights outside the adapter are trainable (model.norm.weight)"),
        (lambda: with_lora(toy_llama(), init_lora_weights="pissa"), "off", "initialised by 'pissa', which subtracted"),
        (lambda: with_lora(toy_llama(), init_lora_weights="olora"), "off", "Use base='initial' (or 'auto')"),
        (_trained_pissa, "auto", "'pissa' but has been trained since"),
        (lambda: _barely_trained("pissa"), "auto", "'pissa' but has been trained since"),
        (lambda: _barely_trained("pissa_niter_4"), "auto", "'pissa_niter_4' but has been trained since"),
        (lambda: _barely_trained("olora"), "auto", "'olora' but has been trained since"),
        (lambda: _saved_start("pissa", torch.float32), "auto", "its weights are how 'pissa' or its like begin"),
        (lambda: _saved_start("pissa", torch.bfloat16), "auto", "its weights are how 'pissa' or its like begin"),
        (lambda: _saved_start("olora", torch.float16), "auto", "its weights are how 'olora' or its like begin"),
        (_pissa_beside_trained, "auto", "'default' is active and trained beside 'second', which was subtracted"),
        (_loftq, "auto", "initialised by LoftQ, which replaced the base weights"),
        (lambda: with_lora(toy_llama()), "adapter_off", "base='adapter_off' is unknown"),
    ],
)
def test_a_false_base_is_refused(make: object, base: str, message: str) -> None:
    model = make()
    with pytest.raises(ValueError) as error:
        attach(model, base=base)
    assert message in str(error.value)
    assert "forward" not in unwrap(model)[0].__dict__  # nothing was left behind


def test_the_model_itself_is_no_separate_base() -> None:
    model = with_lora(toy_llama())
    with pytest.raises(ValueError, match="it would be compared with itself"):
        attach(model, base=model)
    with pytest.raises(ValueError, match="it would be compared with itself"):
        attach(model, base=unwrap(model)[0])


def test_a_separate_base_with_another_vocabulary_is_refused() -> None:
    model = with_lora(toy_llama())
    with pytest.raises(ValueError, match="48 tokens and base= has 50"):
        attach(model, base=toy_llama(vocab_size=50))
    assert "forward" not in unwrap(model)[0].lm_head.__dict__


def test_kasa_is_refused() -> None:
    kasa = pytest.importorskip("peft", minversion="0.20")
    if not hasattr(kasa, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    with pytest.raises(ValueError, match="KaSA, which truncates the base weights"):
        attach(with_lora(toy_llama(), kasa_config=kasa.KasaConfig()))


@pytest.mark.parametrize("init", ["pissa", True])
def test_the_initial_base_under_autocast_is_not_reused_for_the_adapted_pass(init: str | bool) -> None:
    """Autocast caches its casts by parameter; a cast of the initial adapter must not serve the trained one."""
    model = with_lora(toy_llama(), init_lora_weights=init)
    data = batch()
    with attach(model, base="initial") as attachment:
        move(model, 0.3)
        model(**data)
        exact = attachment.last
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**data)
    assert float(exact.kl) > 0.1
    assert float(attachment.last.kl) == pytest.approx(float(exact.kl), rel=0.05)
    assert float(attachment.last.ce) == pytest.approx(float(exact.ce), rel=0.05)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_adapters_that_start_from_singular_vectors_are_checked_to_be_untrained(init: str) -> None:
    model = with_lora(toy_llama(), init_lora_weights="pissa")  # the same structure, without their calibration data
    model.peft_config["default"].init_lora_weights = init
    assert _resolve(model).kind == "initial"
    move(model, 0.3)
    with pytest.raises(ValueError, match=f"'{init}' but has been trained since"):
        attach(model)


def test_an_inactive_adapter_that_was_subtracted_is_refused() -> None:
    model = with_lora(toy_llama(), init_lora_weights="pissa")
    model.add_adapter("second", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"initialised by 'pissa', which subtracted it .* but it is not active"):
        attach(model)


def _add(model: nn.Module) -> None:
    model.add_adapter("second", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("second")


def _scale(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_add, "added, switched, scaled or replaced"),
        (_scale, "added, switched, scaled or replaced"),
        (lambda model: model.merge_adapter(), "merged into the base weights"),
    ],
)
def test_adapters_that_change_under_the_initial_base_are_noticed(change: object, message: str) -> None:
    model = with_lora(toy_llama(), init_lora_weights="pissa")
    with attach(model):
        change(model)
        with pytest.raises((RuntimeError, ValueError), match=message):
            model(**batch())


def test_an_adapter_that_came_after_the_base_was_settled_is_noticed() -> None:
    """It may have rewritten the base's weights, as PiSSA does; one that was there may be made active at any time."""
    model = with_lora(toy_llama())
    model.add_adapter("there", LoraConfig(r=4, target_modules=TARGETS))
    with attach(model):
        model.set_adapter("there")
        model(**batch())
        model.add_adapter("late", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"))
        model.set_adapter("late")
        with pytest.raises(RuntimeError, match="adapter 'late' was added since the base was settled"):
            model(**batch())


def _on_backbone(model: nn.Module, config: LoraConfig) -> None:
    model.model = get_peft_model(model.model, config)


def _injected(model: nn.Module, config: LoraConfig) -> None:
    inject_adapter_in_model(config, model.model)


@pytest.mark.parametrize("put", [_on_backbone, _injected])
def test_an_adapter_on_a_part_of_the_model_is_audited_too(put: Callable[[nn.Module, LoraConfig], None]) -> None:
    model = toy_llama()
    original = copy.deepcopy(model)
    put(model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    base = _resolve(model)
    assert base.kind == "initial"
    move(model, 0.3)
    with base.context():
        assert torch.allclose(_logits(model), _logits(original), atol=1e-5)


def test_configs_of_the_same_name_on_several_parts_are_all_found() -> None:
    model = toy_llama()
    for layer, init in ((0, True), (1, "pissa")):
        inject_adapter_in_model(
            LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init), model.model.layers[layer]
        )
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    assert sorted(unwrap(model)[1]) == ["model.layers.0.default", "model.layers.1.default"]
    assert _resolve(model).kind == "initial"


def test_adapter_layers_without_any_config_are_taken_with_a_warning() -> None:
    model = toy_llama()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=TARGETS), model)
    del model.peft_config
    with pytest.warns(UserWarning, match="no PEFT config, so that nothing proves"):
        assert _resolve(model).kind == "off"


def test_weights_that_are_thawed_under_training_are_noticed() -> None:
    model = with_lora(toy_llama())
    with attach(model):
        model(**batch())
        lora = next(p for n, p in model.named_parameters() if "lora_A" in n)
        lora.requires_grad_(False)
        model(**batch())
        lora.requires_grad_(True)
        model.base_model.model.model.norm.weight.requires_grad_()
        with pytest.raises(RuntimeError, match=r"1 weights outside the adapter .* trainable now \(model.norm.weight\)"):
            model(**batch())
    with attach(model, base=toy_llama()):  # which is not the model that moves
        model(**batch())
        model.base_model.model.model.layers[0].input_layernorm.weight.requires_grad_()
        model(**batch())


def _merge_by_hand(model: nn.Module) -> None:
    """As ReLoRA does it: nothing of PEFT's is told."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().weight.data += layer.get_delta_weight("default")
            layer.lora_B["default"].weight.data.zero_()


@pytest.mark.parametrize("separate", [False, True])
def test_base_weights_that_are_written_over_are_noticed(separate: bool) -> None:
    model = with_lora(toy_llama(), moved=0.3)
    other = with_lora(toy_llama(), moved=0.3)  # a base= that is a PeftModel's inner model moves just so
    attachment = attach(model, base=unwrap(other)[0] if separate else "auto")
    model(**batch())
    attachment.check_base()
    _merge_by_hand(other if separate else model)
    linears = sum(isinstance(layer, LoraLayer) for layer in model.modules())
    first = r"model\.layers\.0\.self_attn\.q_proj\.base_layer\.weight"
    with pytest.warns(UserWarning, match=rf"{linears} weights of the base have changed .* \({first}, .* by up to \d"):
        attachment.check_base()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        attachment.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounds_the_base_weights_is_no_change(dtype: torch.dtype) -> None:
    model = with_lora(toy_llama(), moved=0.3)
    with warnings.catch_warnings(), attach(model) as attachment:
        warnings.simplefilter("error")
        model.to(dtype)
        model(**batch()).loss.backward()
        model.merge_adapter()
        model.unmerge_adapter()
        move(model, 0.3)
        attachment.check_base()
        unwrap(model)[0].resize_token_embeddings(80)  # whose parameter is another


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float4_e2m1fn_x2", "uint4", "int8", "bool"])
def test_quantised_base_weights_are_watched_by_their_bytes(name: str) -> None:
    module = nn.Linear(16, 16, bias=False)
    data = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    data = data % 2 if name == "bool" else data
    module.weight = nn.Parameter(data.view(getattr(torch, name)), requires_grad=False)
    weights = BaseWeights(module)
    assert weights.changed() == {}
    data[0, 0] += 1
    assert list(weights.changed()) == ["weight"]
    module.weight = nn.Parameter(torch.ones(16, 16))  # another scale, which can't be compared
    assert weights.changed() == {}


def test_the_embeddings_under_trained_tokens_are_the_bases() -> None:
    model = with_lora(toy_llama(), trainable_token_indices=[3, 4])
    inner = unwrap(model)[0]
    expected = {id(p) for p in inner.parameters() if p.requires_grad}
    assert {id(p) for p in adapter_parameters(inner)} == expected
    inner.get_input_embeddings().token_adapter.base_layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="1 weights outside the adapter are trainable"):
        attach(model)
