"""Every causal LM and every image-text model of the installed transformers, found by enumeration and built at toy size.

Sizes follow from the names of a config's fields (:data:`RULES`), whatever the family; what these rules can't tell is in
:data:`SPECIAL`. A new transformers' new type becomes a case by itself.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from compatibility.check import Outcome, check
from conftest import batch

VOCABULARY = 96  # ids that text uses; a multimodal model's placeholders come after them
PLACEHOLDERS = 32
MAX_PARAMETERS = 100_000_000  # above, a rule has missed a size

# A field's toy value: of the first pattern that matches its whole name. Only numbers are replaced (no flag, no list, no
# number that the config derived from others), by a number of the same type.
RULES: tuple[tuple[str, float], ...] = (
    (r".*(drop|jitter|noise).*", 0.0),
    (r"initializer_range|initializer_factor|init_std|embed_init_std|embedding_initializer_range", 0.1),
    (r"router_aux_loss_coef|aux_loss_coef|moe_loss_weight", 0.3),
    # What is done to the embeddings, the residual stream and the logits: never 1.
    (r"logits_scaling|logits_mup_width_multiplier", 3.0),
    (r"logit_scale|lm_head_multiplier|residual_multiplier|output_multiplier", 0.5),
    (r"embedding_multiplier|scale_emb", 2.0),
    (r"logits_soft_cap|output_logit_soft_cap|final_logit_softcapping", 5.0),
    # Experts.
    (r"(num_|n_routed_|moe_num_|num_local_)experts|zero_expert_num", 4),
    (r"(num_)?(experts_per_tok|experts_per_token|top_k_experts)|moe_top_?k|moe_k", 2),
    (r"n_group|num_expert_group", 2),
    (r"decoder_sparse_step|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|prefix_dense.*pattern", 1),
    (r".*(moe|expert).*(intermediate|ffn_hidden)_size|moe_ffn_hidden_size", 32),
    # Windows and blocks shorter than a sequence.
    (r"sliding_window|sliding_window_size|attention_window_size|local_attention|index_topk", 4),
    (r"sliding_window_pattern|global_attn_every_n_layers", 2),
    # Widths.
    (r"attention_hidden_size", 128),
    (r".*(kv|key_value)_heads|num_kv_heads|kv_n_heads|linear_num_key_heads", 2),
    (r"(.*_)?(heads|n_head)|n_heads", 4),
    (r"(.*_)?(head_dim|head_size|d_head|kv_channels|dim_head|d_kv)", 16),
    (r"qk_rope_head_dim|rotary_dim", 16),
    (r".*_rank", 16),
    (r"(.*_)?(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|feed_forward_size|d_inner)", 128),
    (r"dff|dim_ff|d_ff|mlp_dim|mamba_d_ssm", 128),
    (r"hidden_size_per_layer_input", 16),
    (r"(.*_)?(hidden_size|hidden_size_global|embedding_size|n_embd|d_model|emb_dim|embed_dim|hidden_dim)", 64),
    (r"adapter_in_dim|adapter_out_dim|adapter_input_size|base_channels", 64),
    (r"projection_dim|projection_hidden_dim|vision_output_dim|projector_(in|out)put_dim|dim_model_base", 64),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"n_groups|mamba_n_groups|mamba_ngroups", 1),
    # Depths.
    (r"num_mtp_layers|num_nextn_predict_layers|num_kv_shared_layers", 0),
    (r"(.*_)?(num_hidden_layers|encoder_layers|decoder_layers|num_layers|n_layers?|num_blocks)|depth|layers", 2),
    # Vocabularies and positions.
    (r"(bos|cls|decoder_start)_token_id", 1),
    (r"(eos|sep|forced_eos|eod)_token_id", 2),
    (r"(pad|mask|unk)_token_id", 0),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length", 128),
)

# Replaced also where the default is None, which some models can't be built with.
ALSO_NONE = re.compile(
    "head_dim|num_key_value_heads|moe_intermediate_size|n_(routed|shared)_experts|num_experts_per_tok|(n|topk)_group"
)

AUX_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA_LIKE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # PEFT refuses two of their layers

MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
MROPE_HALF = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}

# By model type, also of a config inside another: what the rules don't tell.
SPECIAL: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 120, "IMGIMGA": 121}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "moe_intermediate_size": 32, "top_k_experts": 2},
    "doge": {"is_moe": True},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121, "<|visual token 000000|>": 122}},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    "glm4v_text": MROPE,
    "glm4v_moe_text": MROPE_HALF,
    "glm5_next_text": {"index_topk": 16},
    "glm_ocr_text": MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    "hunyuan_vl_text": MROPE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120, "vision_end_token_id": 121},
    "wavtokenizer_encoder": {"codebook_dim": 64},
    "mistral4": {"head_dim": 32},
    "nemotron_h": {"mamba_head_dim": 32},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120, "vision_end_token_id": 121},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [2, 5], "axial_pos_embds_dim": [32, 32]},
    "step3p5": {"sliding_window": 4},
    "xlnet": {"mem_len": None},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

# What an adapter on every linear layer doesn't fit: settings of LoraConfig.
LORA: dict[str, dict[str, Any]] = {"qwen3_omni_moe_thinker": {"target_modules": ["q_proj", "v_proj"]}}


def _as_it_is(model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return data


def _codebooks(model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Four streams of tokens for each row."""
    return {"input_ids": data["input_ids"].repeat(4, 1), "labels": data["labels"][..., None].repeat(1, 1, 4)}


EXTEND = {"musicgen": _codebooks, "musicgen_melody": _codebooks}


@dataclass(frozen=True)
class Case:
    """A model at toy size, from ``build()``, and what its batch has beside text."""

    name: str
    build: Callable[[], nn.Module]
    extend: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]] = _as_it_is
    aux_coefficient: float = 0.0
    last_layer: bool = False  # whether the adapter is on the last layer alone, so that the others are shared


def toy_settings(config: PretrainedConfig, vocabulary: int) -> dict[str, Any]:
    """Settings for another config of this class, at toy size; ``config`` is one with its defaults."""
    kind = type(config)
    own = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    settings: dict[str, Any] = {}
    for name, value in own.items():
        if name in kind.sub_configs:
            if isinstance(value, PretrainedConfig):
                settings[name] = toy_settings(value, vocabulary) | {"model_type": value.model_type}
        elif re.fullmatch(r"(.*_)?vocab_size(_.*)?", name) and value is not None:
            settings[name] = vocabulary
        elif isinstance(getattr(kind, name, value), (str, type(None))) and not ALSO_NONE.fullmatch(name):
            continue
        elif (toy := _toy_value(name, 1 if value is None and ALSO_NONE.fullmatch(name) else value)) is not None:
            settings[name] = toy
        elif vocabulary > VOCABULARY and re.fullmatch(r".*_token_(id|index)", name) and isinstance(value, int):
            settings[name] = VOCABULARY + _place(name)
    if "final_logit_softcapping" in own:
        settings["final_logit_softcapping"] = 5.0
    if "is_decoder" in own:
        settings["is_decoder"] = True
    if "kv_lora_rank" in own and "num_key_value_heads" in own:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= _layers(config, settings) | _rope(config, settings)
    return _merged(settings, copy.deepcopy(SPECIAL.get(config.model_type, {})))


def _toy_value(name: str, value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:  # 0 is something left out
        return None
    for pattern, toy in RULES:
        if re.fullmatch(pattern, name):
            return type(value)(toy) if isinstance(value, float) or toy == int(toy) else toy
    return None


def _place(name: str) -> int:
    """Of a placeholder among them; the same for image_token_id and image_token_index."""
    known = ("image", "video", "audio", "vision_start", "vision_end", "boi", "eoi", "boa", "eoa")
    stem = re.sub(r"_token_(id|index)$", "", name)
    return known.index(stem) if stem in known else len(known) + sum(map(ord, stem)) % (PLACEHOLDERS - len(known))


def _layers(config: PretrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """One layer at least of each kind, of lists that name each layer's kind."""
    depth = next((n for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if n in settings), None)
    if depth is None:
        return {}
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == vars(config)[depth]
    }
    named = {name: value for name, value in lists.items() if value and all(isinstance(v, str) for v in value)}
    kinds = {name: list(dict.fromkeys(value)) for name, value in named.items()}
    layers = min(4, max([2, *map(len, kinds.values())]))
    result: dict[str, Any] = {depth: layers}
    for name, value in lists.items():
        if len(kinds.get(name, ())) > 1:
            result[name] = (kinds[name] * layers)[:layers]
        elif getattr(type(config), name, None) is not None:  # not derived from other fields
            result[name] = list(value)[:layers]
    return result


def _rope(config: PretrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary embedding in three dimensions, for the toy's heads."""
    rope = getattr(config, "rope_parameters", None) or {}
    sections = rope.get("mrope_section")
    if not sections:
        return {}
    width = settings.get("qk_rope_head_dim") or settings.get("head_dim", 16)
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    scaled = [round(section * half / sum(sections)) for section in sections[:2]]
    return {"rope_parameters": rope | {"mrope_section": [*scaled, half - sum(scaled)]}}


def build(model_type: str, names: Mapping[str, str] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **given: Any) -> nn.Module:
    """The model of a type at toy size, with noise on all its weights."""
    kind = CONFIG_MAPPING[model_type]
    vocabulary = VOCABULARY + PLACEHOLDERS if kind.sub_configs else VOCABULARY
    config = kind(**_merged(toy_settings(kind(), vocabulary), given))
    model_class = getattr(transformers, names[model_type])
    if not isinstance(config, model_class.config_class):  # the language model alone of a larger one
        config = next((c for c in vars(config).values() if isinstance(c, model_class.config_class)), config)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"at toy size it has {size / 1e6:.0f} million weights")
    model = model_class(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.05 * torch.randn_like(parameter)
    return model.train()  # type: ignore[no-any-return]


def _merged(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``given`` over ``settings``, also inside the configs that a config holds."""
    inner = {n: _merged(settings[n], v) for n, v in given.items() if isinstance(v, dict) and n in settings}
    return settings | given | inner


def enumerate_cases() -> list[Case]:
    """All of them, in a stable order."""
    cases = [Case(t, lambda t=t: build(t), EXTEND.get(t, _as_it_is)) for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    images = [
        Case(f"{t} (image-text model)", lambda t=t: build(t, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES), _text_only)
        for t, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(t) != name
    ]
    last = [replace(case, name=f"{case.name}, adapter on the last layer", last_layer=True) for case in cases]
    return cases + images + list(_with_images()) + list(_variants()) + last


def _text_only(model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Token types, without which some of them don't train."""
    names = [n for n in ("token_type_ids", "mm_token_type_ids") if n in inspect.signature(model.forward).parameters]
    return data | {name: torch.zeros_like(data["input_ids"]) for name in names}


# Settings with which an image becomes four tokens, and the image: of three rows.
IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": ({"vision_config": {"image_size": 28, "patch_size": 14}}, {"pixel_values": (3, 3, 28, 28)}),
    "paligemma": ({"vision_config": {"image_size": 28, "patch_size": 14}}, {"pixel_values": (3, 3, 28, 28)}),
    "gemma3": (
        {"vision_config": {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
        {"pixel_values": (3, 3, 28, 28)},
    ),
    "internvl": (
        {"vision_config": {"image_size": [56, 56], "patch_size": [14, 14]}},
        {"pixel_values": (3, 3, 56, 56)},
    ),
    "idefics3": ({"vision_config": {"image_size": 64, "patch_size": 16}}, {"pixel_values": (3, 1, 3, 64, 64)}),
    "smolvlm": ({"vision_config": {"image_size": 64, "patch_size": 16}}, {"pixel_values": (3, 1, 3, 64, 64)}),
    "qwen2_vl": ({}, {"pixel_values": (48, 1176), "image_grid_thw": [[1, 4, 4]] * 3}),
    "qwen2_5_vl": ({}, {"pixel_values": (48, 1176), "image_grid_thw": [[1, 4, 4]] * 3}),
    "qwen3_vl": ({}, {"pixel_values": (48, 1536), "image_grid_thw": [[1, 4, 4]] * 3}),
}


def _with_images() -> Iterator[Case]:
    for t, (given, images) in IMAGES.items():
        yield Case(
            f"{t} (with images)",
            lambda t=t, given=given: build(t, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **given),
            lambda model, data, images=images: _add_images(model, data, images),
        )


def _add_images(model: nn.Module, data: dict[str, Tensor], images: dict[str, Any]) -> dict[str, Tensor]:
    """An image of four tokens in each row, from the second position on."""
    place = slice(1, 5)
    config: Any = model.config
    data = _text_only(model, data)
    data["input_ids"][:, place] = getattr(config, "image_token_id", None) or config.image_token_index
    data["labels"][:, place] = -100
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in data:
            data[name][:, place] = 1
    generator = torch.Generator().manual_seed(0)
    for name, value in images.items():
        data[name] = torch.randn(value, generator=generator) if isinstance(value, tuple) else torch.tensor(value)
    return data


def _variants() -> Iterator[Case]:
    for t in ("llama", "qwen2", "gemma2", "gemma3_text"):
        for tied in (True, False):
            yield Case(f"{t}, tie_word_embeddings={tied}", lambda t=t, tied=tied: build(t, tie_word_embeddings=tied))
    yield Case("llama, padded vocabulary", lambda: build("llama", vocab_size=VOCABULARY + PLACEHOLDERS))
    yield Case("llama, head with a bias", _biased)
    for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = CONFIG_MAPPING[t]
        if hasattr(kind, "output_router_logits") and any(hasattr(kind, n) for n in AUX_COEFFICIENTS):
            given = {"output_router_logits": True}
            yield Case(f"{t}, output_router_logits=True", lambda t=t, g=given: build(t, **g), aux_coefficient=0.3)


def _biased() -> nn.Module:
    model: Any = build("llama")
    head = nn.Linear(64, VOCABULARY)
    head.weight.data.copy_(model.lm_head.weight)
    model.lm_head = head
    return model  # type: ignore[no-any-return]


def adapt(model: nn.Module, inputs: dict[str, Any], last_layer: bool = False) -> Any:
    """LoRA on every linear layer but the head, and those that the forward shows to be none."""
    config: Any = model.config
    excluded = ["out_proj", "conv1d"] if config.model_type in MAMBA_LIKE else []
    if last_layer:
        towers = re.compile("vision|visual|image|audio")
        stacks = {
            n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and not towers.search(n)
        }
        stack = max(stacks, key=lambda n: sum(p.numel() for p in stacks[n].parameters()))
        kept = f"{stack}.{len(stacks[stack]) - 1}."
        linear = (nn.Linear, Conv1D)
        excluded += [n for n, m in model.named_modules() if isinstance(m, linear) and not n.startswith(kept)]

    def look(name: str, module: nn.Linear, given: tuple[Tensor], output: Any) -> None:
        if not isinstance(output, Tensor) or output.shape != (*given[0].shape[:-1], module.out_features):
            excluded.append(name)  # a router, a grouped projection

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                hooks.enter_context(module.register_forward_hook(partial(look, name)))
        model.train()(**inputs)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    settings |= {"exclude_modules": excluded or None} | LORA.get(config.model_type, {})
    return get_peft_model(model, LoraConfig(**settings)).train()  # type: ignore[arg-type]


def run(case: Case) -> Outcome:
    """Build and check one case."""
    try:
        torch.manual_seed(0)
        original = case.build()
        data = case.extend(original, batch(vocabulary=VOCABULARY))
        inputs = {name: value for name, value in data.items() if name != "labels"} | {"use_cache": False}
        if original.config.is_encoder_decoder:
            inputs["labels"] = data["labels"]
        model = adapt(copy.deepcopy(original), inputs, case.last_layer)
        if not model(**inputs).logits.requires_grad:  # it computes its own backward, from the embeddings on
            model.get_base_model().enable_input_require_grads()
    except Exception as error:
        return Outcome(case.name, "not built", _reason(error))
    try:
        return check(case.name, original, model, data, aux_coefficient=case.aux_coefficient)
    except Exception as error:
        return Outcome(case.name, "wrong", _reason(error))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def summary(outcomes: list[Outcome]) -> str:
    """The causal-LM types that can be built."""
    built = [o for o in outcomes if o.name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and o.outcome != "not built"]
    others = [outcome.name for outcome in built if outcome.outcome != "exact"]
    return (
        f"Of {len(built)} causal-LM types that can be built {len(built) - len(others)} are exact"
        f"{'; not ' + ', '.join(others) if others else ''}."
    )
