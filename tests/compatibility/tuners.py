"""Every adapter of the installed PEFT, found by enumeration: types, initialisations, variants of LoRA, and ways to use
them. A new PEFT's new adapter becomes a case by itself."""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

import conftest
from compatibility.check import Outcome, check
from conftest import batch, move, toy_llama
from mask_the_target import sine_lora  # noqa: F401  (makes it known to PEFT)

TARGETS = ["q_proj", "v_proj", "down_proj"]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "initializer_range": 0.1}

# What defaults don't fit a toy of this size, or must be given: of fields by their names, then of single adapters.
FIELDS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "target_modules": TARGETS,
    "r": 4,
    "num_virtual_tokens": 4,
    "token_indices": [5, 9],
    "n_frequency": 64,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "ADALORA": {"r": 8, "init_r": 4, "target_r": 2, "total_step": 100, "tinit": 10, "tfinal": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": None},
    "C3A": {"block_size": 32},
    "CPT": {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "MISS": {"mini_r": 1},
    "ROAD": {"group_size": 32},
    "OFT": {"r": 0, "oft_block_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"]},
    "VBLORA": {"num_vectors": 32, "vector_length": 32},
}


# Types that train no update of the base's weights, beside those that train virtual tokens: a prompt in each layer, a
# second network, the mixture of adapters that stay as they are.
NO_WEIGHT_UPDATE = ("ADAPTION_PROMPT", "SHADOW", "XLORA")


# PEFT leaves these weights as they lie in memory, so that no two runs are of the same model.
UNINITIALISED = ("TINYLORA, init_weights=False",)


@dataclasses.dataclass(frozen=True)
class Case:
    """``adapt(base) -> (model, base= of attach)``: what a user would do; it may raise where PEFT itself refuses."""

    name: str
    adapt: Callable[[nn.Module], tuple[nn.Module, Any]]
    base: Callable[[], nn.Module]


def toy() -> nn.Module:
    """A Llama of two layers whose sizes suit every adapter's blocks."""
    return toy_llama(**SIZES)


def toy_experts() -> nn.Module:
    """A mixture of experts, whose experts' weights are parameters and no linear layers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **(conftest.SIZES | SIZES), moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16
    )
    return transformers.Qwen3MoeForCausalLM(config)


def make_config(kind: str, **given: Any) -> Any:
    """The config of a PEFT type at toy size."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config)}
    settings = {name: value for name, value in FIELDS.items() if name in known}
    return config(**copy.deepcopy(settings | SPECIAL.get(kind, {}) | given))


def enumerate_cases() -> list[Case]:
    """All of them, in a stable order."""
    cases: list[Case] = []

    def add(name: str, make: Callable[[], Any]) -> None:
        cases.append(Case(name, lambda base: (peft.get_peft_model(base, make()), "auto"), toy))

    for kind in map(str, PEFT_TYPE_TO_CONFIG_MAPPING):
        kind = kind.removeprefix("PeftType.")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        if kind in ("XLORA", "ADALORA"):
            continue  # made of trained adapters; adds a term to the loss: both below
        add(kind, lambda kind=kind: make_config(kind))
        for field, value in _initialisations(config):
            if kind != "SINELORA":  # inherits LoRA's choices, and refuses most
                add(f"{kind}, {field}={value!r}", lambda k=kind, f=field, v=value: make_config(k, **{f: v}))
    for field in dataclasses.fields(peft.LoraConfig):
        if field.metadata.get("is_lora_variant") and field.name in VARIANTS:
            add(f"LORA, {field.name}", lambda name=field.name: make_config("LORA", **{name: VARIANTS[name]()}))
        elif field.metadata.get("is_lora_variant"):
            add(f"LORA, {field.name}", lambda name=field.name: make_config("LORA", **{name: True}))
    return cases + list(_ways_to_use())


def _initialisations(config: Any) -> Iterator[tuple[str, Any]]:
    """Each value of each ``init..`` field that is a choice, beside its default."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if not field.name.startswith("init") or field.name not in hints:
            continue
        values: list[Any] = []
        pending = [hints[field.name]]
        while pending:
            hint = pending.pop(0)
            if typing.get_origin(hint) is typing.Literal:
                values += typing.get_args(hint)
            elif hint is bool:
                values += [True, False]
            else:
                pending += typing.get_args(hint)
        values += field.metadata.get("lora_variants", [])
        for value in dict.fromkeys(values):
            if value != field.default and value not in ("eva", "corda", "lora_ga", "loftq"):  # from data, below
                yield field.name, re.sub(r"\[.*\]", "4", value) if isinstance(value, str) else value


# Variants whose field is a config of its own.
VARIANTS: dict[str, Callable[[], Any]] = {
    "kasa_config": lambda: peft.KasaConfig(),
    "monteclora_config": lambda: peft.MontecloraConfig(),
    "velora_config": lambda: peft.VeloraConfig(),
    "arrow_config": lambda: peft.ArrowConfig(),
    "use_bdlora": lambda: peft.BdLoraConfig(
        target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2, match_strict=False
    ),
    "alora_invocation_tokens": lambda: [7],
}


def _lora(base: nn.Module, **config: Any) -> nn.Module:
    return peft.get_peft_model(base, make_config("LORA", **config))


def _from_data(init: str) -> Callable[[nn.Module], tuple[nn.Module, Any]]:
    """Initialisations that look at data: through PEFT's own functions."""

    def adapt(base: nn.Module) -> tuple[nn.Module, Any]:
        data = [batch(seed=seed, vocabulary=96) for seed in range(4)]
        if init == "eva":
            model = _lora(base, init_lora_weights="eva", eva_config=peft.EvaConfig())
            peft.initialize_lora_eva_weights(model, data)
        elif init == "corda":
            from peft.tuners.lora.config import CordaConfig
            from peft.tuners.lora.corda import preprocess_corda

            config = make_config("LORA", init_lora_weights="corda", corda_config=CordaConfig())
            single = [batch(rows=1, seed=seed, vocabulary=96) for seed in range(8)]  # it takes a batch of one
            preprocess_corda(base, config, run_model=lambda: [base(**row) for row in single])
            model = peft.get_peft_model(base, config)
        else:
            from peft.tuners.lora import preprocess_loraga

            config = make_config("LORA", init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
            preprocess_loraga(base, config, train_step=lambda: [base(**rows).loss.backward() for rows in data])
            base.zero_grad()
            model = peft.get_peft_model(base, config)
        return model, "auto"

    return adapt


def _xlora(base: nn.Module) -> tuple[nn.Module, Any]:
    """X-LoRA mixes trained adapters that it loads from folders."""
    import tempfile

    folder = tempfile.mkdtemp()
    for name in ("one", "two"):
        trained = _lora(copy.deepcopy(base))
        move(trained, 0.05)
        trained.save_pretrained(f"{folder}/{name}")
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=SIZES["hidden_size"],
        adapters={"0": f"{folder}/one", "1": f"{folder}/two"},
    )
    base.config.use_cache = False
    return peft.get_peft_model(base, config), "auto"


def _two_adapters(base: nn.Module) -> tuple[nn.Module, Any]:
    model = _lora(base)
    model.add_adapter("other", make_config("LORA", r=2, target_modules=["k_proj", "v_proj"]))
    move(model, 0.05)
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model, "auto"


def _native(base: nn.Module) -> tuple[nn.Module, Any]:
    return peft.inject_adapter_in_model(make_config("LORA"), base), "auto"


def _adalora(base: nn.Module) -> tuple[nn.Module, Any]:
    """Through the inner model: PEFT's wrapper adds its orthogonality term to whatever loss that gives."""
    return peft.get_peft_model(base, make_config("ADALORA")).get_base_model(), "auto"


def _merged(base: nn.Module) -> tuple[nn.Module, Any]:
    model = _lora(base)
    model.merge_adapter()
    return model, "auto"


def toy_torchao() -> nn.Module:
    """Its linear layers' weights in torchao's int8."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = toy()
    quantize_(base.model, Int8WeightOnlyConfig())
    return base


def toy_bitsandbytes() -> nn.Module:
    """Its linear layers in bitsandbytes' 4 bit (nf4)."""
    import bitsandbytes

    base = toy()
    for name, module in list(base.model.named_modules()):
        if isinstance(module, nn.Linear):
            new = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            new.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(base.model.get_submodule(parent), child, new.to("cpu"))
    return base


def _ways_to_use() -> Iterator[Case]:
    def case(name: str, base: Any = "auto", make: Callable[[], nn.Module] = toy, **config: Any) -> Case:
        return Case(name, lambda model: (_lora(model, **config), base), make)

    def trained(base: nn.Module) -> nn.Module:
        model = _lora(base)
        move(model, 0.05)
        return model

    yield Case("LORA, init_lora_weights='eva'", _from_data("eva"), toy)
    yield Case("LORA, init_lora_weights='corda'", _from_data("corda"), toy)
    yield Case("LORA, init_lora_weights='lora_ga'", _from_data("lora_ga"), toy)
    yield case(
        "LORA, init_lora_weights='loftq'", init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}
    )
    yield case("LORA, use_rslora", use_rslora=True)
    yield case("LORA, lora_bias", lora_bias=True)
    yield case("LORA, bias='all'", make=lambda: toy_llama(**SIZES, attention_bias=True), bias="all")
    yield case("LORA on embeddings", target_modules=[*TARGETS, "embed_tokens"])
    yield case("LORA on the head", target_modules=[*TARGETS, "lm_head"])
    yield case("DoRA on the head", target_modules=[*TARGETS, "lm_head"], use_dora=True)
    yield case("LORA, modules_to_save=lm_head", modules_to_save=["lm_head"])
    yield case("LORA, modules_to_save=embed_tokens", modules_to_save=["embed_tokens"])
    yield case("LORA, modules_to_save=norm", modules_to_save=["norm"])
    yield case("LORA, trainable_token_indices", trainable_token_indices=[5, 9])
    yield case("LORA, layer_replication", layer_replication=[[0, 2], [0, 2]])
    experts = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    yield case("LORA, target_parameters (experts)", make=toy_experts, **experts)
    yield case("LORA on a PiSSA, base='off'", base="off", init_lora_weights="pissa")
    yield Case("LORA, trained before, base='off'", lambda base: (trained(base), "off"), toy)
    yield Case("LORA, two adapters, both active", _two_adapters, toy)
    yield Case("LORA by inject_adapter_in_model", _native, toy)
    yield Case("LORA, merged", _merged, toy)
    yield Case("ADALORA", _adalora, toy)
    yield Case("XLORA", _xlora, toy)
    yield case("LORA on torchao int8", make=toy_torchao)
    yield case("LORA on bitsandbytes nf4", make=toy_bitsandbytes)


def run(case: Case) -> Outcome:
    """Build and check one case."""
    if case.name in UNINITIALISED:
        return Outcome(case.name, "not built", "PEFT leaves its weights uninitialised")
    torch.manual_seed(0)
    try:
        original = case.base()
        base_model = copy.deepcopy(original)
        model, base = case.adapt(base_model)
    except Exception as error:  # PEFT's own refusals, missing packages and GPUs
        reason = str(error).strip() or type(error).__name__
        return Outcome(case.name, "not built", f"{type(error).__name__}: {reason.splitlines()[0]}")
    data = batch(vocabulary=96)
    data["input_ids"][:, 1] = 7  # what switches activated LoRA on
    return check(case.name, original, model, data, base=base)


def summary(outcomes: list[Outcome]) -> str:
    """PEFT's types that train a weight update, each by the case that bears its name."""
    types = {str(kind).removeprefix("PeftType.") for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {*NO_WEIGHT_UPDATE}
    asked = [o for o in outcomes if o.name in types and "adds virtual tokens" not in o.why]
    others = [outcome.name for outcome in asked if outcome.outcome != "exact"]
    return (
        f"Of {len(asked)} types that train an update of weights {len(asked) - len(others)} are exact"
        f"{'; not ' + ', '.join(others) if others else ''}. Refused on purpose are also uses that would be wrong: "
        "merged adapters, base='off' on what was subtracted from the base, biases of the base that are trained."
    )
