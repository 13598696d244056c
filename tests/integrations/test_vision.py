"""A model that sees images, in SFTTrainer with TRL's collator for them: a toy LLaVA, made here."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from trl import SFTConfig, SFTTrainer

from conftest import SIZES
from integrations.test_transformers import _arguments, _logged, _tokenizer
from mask_the_target import TMKL, Anchors, TMKLCallback
from reference import reference_loss

# By Pillow alone; the other one needs torchvision. Older versions of transformers have one only.
ImageProcessor: Any = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)")


def _processor() -> LlavaProcessor:
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %} <{{ m.role }}> {% for part in m.content %}"
        "{% if part.type == 'image' %} <image> {% else %} {{ part.text }} {% endif %}{% endfor %}"
        "{% if m.role == 'assistant' %} <eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} <assistant> {% endif %}"
    )
    images = ImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _model(processor: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**(SIZES | {"vocab_size": len(tokenizer)}))
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).train()


def _trainer(tmp_path: Path, form: str, callback: TMKLCallback) -> SFTTrainer:
    rows = []
    for i in range(8):
        image = Image.new("RGB", (8, 8), (30 * i, 50, 90))
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"w{i} w{i + 1}"}]}]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": "w3 w4 " * (i % 3 + 1)}]}]
        split = {"prompt": asked, "completion": answer} if form == "completion" else {"messages": asked + answer}
        rows.append({"images": [image], **split})
    processor = _processor()
    return SFTTrainer(
        _model(processor),
        args=_arguments(tmp_path, SFTConfig, max_length=None, learning_rate=0.5),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=copy.deepcopy(LORA),
        callbacks=[callback],
    )


@pytest.mark.parametrize("form", ["completion", "messages"])
def test_the_loss_is_the_references_on_images_and_text(tmp_path: Path, form: str) -> None:
    options = TMKL(weight=0.5)
    trainer = _trainer(tmp_path, form, TMKLCallback(options))
    processor = trainer.processing_class
    seen: list[Any] = []
    training_step = trainer.training_step

    def step(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        seen.append(({name: value.clone() for name, value in inputs.items()}, adapter, num_items_in_batch))
        return training_step(model, inputs, num_items_in_batch)

    trainer.training_step = step
    trainer.train()
    base, adapted = _model(processor), get_peft_model(_model(processor), copy.deepcopy(LORA))
    for entry, (data, adapter, counted) in zip(_logged(trainer), seen, strict=True):
        assert "pixel_values" in data
        adapted.load_state_dict(adapter, strict=False)
        expected = reference_loss(adapted, base, data, options)
        for name in ("ce", "kl"):
            assert entry[name] == pytest.approx(float(getattr(expected, name)), rel=1e-4, abs=2e-6), name
        # older trainers also count the labels of first positions, which nothing predicts
        items = int((data["labels"][:, 1:] != -100).sum())
        assert entry["loss"] == pytest.approx(float(expected.loss) * items / int(counted), rel=1e-4)
    assert _logged(trainer)[-1]["kl"] > 1e-3


def test_anchors_of_text_do_not_go_into_batches_of_images(tmp_path: Path) -> None:
    anchors = Anchors(count=4, length=4)
    trainer = _trainer(tmp_path, "completion", TMKLCallback(TMKL(context_weight=0.5), anchors=anchors))
    with pytest.raises(ValueError, match="their rows hold images, prompt, completion, which an anchor of text alone"):
        trainer.train()
    assert trainer.state.global_step == 0
