"""A toy model that is read from a folder as any other, and the reference of what a framework's trainer logged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

from mask_the_target import TMKL
from mask_the_target.anchors import load_anchors
from reference import reference_loss

DATA = Path(__file__).parents[2] / "examples" / "data" / "opposites.jsonl"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_toy(folder: Path) -> Path:
    """Two layers and a byte-level tokenizer with ChatML's tokens, as a folder of safetensors and JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Recorder:
    """Keeps what each training step of any :class:`~transformers.Trainer` was given, and the trainer itself.

    It stands around ``Trainer.training_step`` and takes nothing away: the framework's own trainer runs as it is.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[dict[str, Any], dict[str, torch.Tensor], Any]] = []
        self.trainer: Any = None
        training_step, recorder = Trainer.training_step, self

        def step(trainer: Trainer, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **kwargs: Any) -> Any:
            keys = ("input_ids", "attention_mask", "position_ids", "labels")
            data = {k: inputs[k].clone() for k in keys if inputs.get(k) is not None}
            adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            recorder.trainer = trainer
            recorder.steps.append((data, adapter, arguments[0] if arguments else kwargs.get("num_items_in_batch")))
            return training_step(trainer, model, inputs, *arguments, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", step)

    def check(
        self,
        folder: Path,
        options: TMKL,
        *,
        steps: int,
        accumulation: int = 1,
        exact: float = 1e-4,
        adapted: nn.Module | None = None,
    ) -> None:
        """What was logged of each step is the reference's on the same batches: a second, untouched base from the
        ``folder``, the adapter as it stood in a copy of the trainer's model (or ``adapted``), and dense logits of both.

        ``loss`` is averaged as the trainer does it: over the step's supervised tokens where it counted them, else over
        each micro-batch and then over these. ``ce`` and ``kl`` are means over the step's supervised tokens, and
        ``context_kl`` over its context positions.
        """
        logs = [entry for entry in self.trainer.state.log_history if "loss" in entry]
        assert len(logs) == steps
        assert len(self.steps) == steps * accumulation
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapted = (copy.deepcopy(self.trainer.model) if adapted is None else adapted).float().train()
        for index, entry in enumerate(logs):
            parts = self.steps[index * accumulation : (index + 1) * accumulation]
            items = sum(int((data["labels"][:, 1:] != -100).sum()) for data, *_ in parts)
            missing = adapted.load_state_dict(parts[0][1], strict=False)
            assert not missing.unexpected_keys
            with torch.no_grad():
                means = [reference_loss(adapted, base, data, options) for data, *_ in parts]
                context = sum(int(r.context) for r in means) or None
                sums = [reference_loss(adapted, base, data, options, items, context) for data, *_ in parts]
            assert entry["ce"] == pytest.approx(sum(float(r.ce) for r in sums), rel=exact)
            assert entry["kl"] == pytest.approx(sum(float(r.kl) for r in sums), rel=exact, abs=exact / 50)
            held = sum(float(r.context_kl) for r in sums)
            if options.context_weight:
                assert context
                assert entry["context_kl"] == pytest.approx(held, rel=exact, abs=exact / 50)
            counted = parts[0][2]
            if counted is None:
                loss = sum(float(r.loss) for r in means) / accumulation
            else:  # transformers 4 also counts the labels of first positions, which nothing predicts
                held *= options.context_weight  # has a denominator of its own
                loss = (sum(float(r.loss) for r in sums) - held) * items / int(counted) + held
            assert entry["loss"] == pytest.approx(loss, rel=exact)
        assert logs[0]["kl"] == pytest.approx(0, abs=exact / 50)  # LoRA begins at the base
        assert logs[-1]["kl"] > 1e-3

    def check_anchors(self, folder: Path, output: Path) -> None:
        """Anchors that the base wrote into ``output`` were in the batches, and nothing of them was a target."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        written = load_anchors(next(output.glob("anchors-*.jsonl")), tokenizer)
        found = 0
        for data, *_ in self.steps:
            ids, labels = data["input_ids"].reshape(-1).tolist(), data["labels"].reshape(-1).tolist()
            for anchor in written:
                starts = [i for i in range(len(ids)) if ids[i : i + len(anchor)] == anchor]
                found += len(starts)
                assert all(set(labels[i : i + len(anchor)]) == {-100} for i in starts)
        assert found
